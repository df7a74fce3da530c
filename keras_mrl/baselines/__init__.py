"""The paper's baselines: other ways to features of few coordinates.

`fixed_features` and `slimmable` are trained. The others are computed from the features of a
fixed-feature net at full width, a net that was trained at one dim only.
"""

from .reductions import LowRankHead as LowRankHead
from .reductions import PrincipalComponents as PrincipalComponents
from .reductions import RandomProbe as RandomProbe
from .reductions import first_coordinates as first_coordinates
from .reductions import fixed_features as fixed_features
from .reductions import low_rank_head as low_rank_head
from .reductions import principal_components as principal_components
from .reductions import random_probe as random_probe
from .slimmable import Slimmable as Slimmable
from .slimmable import Switchable as Switchable
from .slimmable import slimmable as slimmable
