"""BRIDGE: a model trained on any backend becomes a TensorFlow Serving SavedModel.

Examples:
    ```
    version = export_saved_model(model, "models/digits", sample=images[:8], policy=policy)
    ```
"""

from .decoder import ImageDecoder as ImageDecoder
from .export import export_index as export_index
from .export import export_saved_model as export_saved_model
from .job import ExportError as ExportError
