"""What the paper compares Matryoshka training with: other ways to few coordinates.

`fixed_features` and `slimmable` are trained. The others are computed from the features of a
fixed-feature net at full width, a net that was trained at one dim only.
"""

from .coordinates import RandomProbe as RandomProbe
from .coordinates import first_coordinates as first_coordinates
from .coordinates import random_probe as random_probe
from .fixed import fixed_features as fixed_features
from .principal import PrincipalComponents as PrincipalComponents
from .principal import principal_components as principal_components
from .slimmable import slimmable as slimmable
from .slimmable_layers import Slimmable as Slimmable
from .slimmable_layers import Switchable as Switchable
from .svd import LowRankHead as LowRankHead
from .svd import low_rank_head as low_rank_head
