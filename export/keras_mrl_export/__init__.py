"""BRIDGE: a model trained on any backend becomes a TensorFlow Serving SavedModel.

The modules read in the order of the work: `export` checks the `arguments` and the `sample` and
makes a `job`; `process` carries model and job to TensorFlow as a `model_file`; `build` writes the
`signatures` there, with a `gallery` among them, compares them in `parity`, and adds the `warmup`;
`publish` gives the version its number. `policies` publishes a version again, with another policy.

Examples:
    ```
    version = export_saved_model(model, "models/digits", sample=images[:8], policy=policy)
    ```
"""

from .decoder import ImageDecoder as ImageDecoder
from .export import export_index as export_index
from .export import export_saved_model as export_saved_model
from .job import ExportError as ExportError
from .policies import publish_policy as publish_policy
