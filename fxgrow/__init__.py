"""fxgrow: makes any PyTorch network wider where it needs it, while it learns."""

from fxgrow._bottleneck import Bottleneck, Profile
from fxgrow._capture import capture
from fxgrow._checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fxgrow._decide import plan
from fxgrow._errors import (
    CaptureError,
    ExportError,
    FileError,
    FxgrowError,
    MissingExtraError,
    PlanError,
    ProfileError,
    RewriteError,
    ScheduleError,
)
from fxgrow._explain import Explanation, explain
from fxgrow._export import export_onnx
from fxgrow._files import load, resize, save
from fxgrow._grow import grow
from fxgrow._grower import Grower
from fxgrow._growth import Growth
from fxgrow._history import Event, History
from fxgrow._kept import Moments
from fxgrow._limits import Either, Until
from fxgrow._networkx import to_networkx
from fxgrow._plan import Plan
from fxgrow._profile import profile
from fxgrow._recipe import Recipe
from fxgrow._records import Reason, Width
from fxgrow._schedule import Schedule
from fxgrow._schedules import Every, LayerByLayer, OnBottleneck, OnPlateau
from fxgrow._try import Tried, try_widths
from fxgrow._widen import apply, widen
from fxgrow._widths import widths
from fxgrow.initialisers import Proposal, initialiser
from fxgrow.ops import op

__version__ = "0.1.0"
__all__ = [
    "Bottleneck",
    "CaptureError",
    "Checkpoint",
    "Either",
    "Event",
    "Every",
    "Explanation",
    "ExportError",
    "FileError",
    "FxgrowError",
    "Grower",
    "Growth",
    "History",
    "LayerByLayer",
    "MissingExtraError",
    "Moments",
    "OnBottleneck",
    "OnPlateau",
    "Plan",
    "PlanError",
    "Profile",
    "ProfileError",
    "Proposal",
    "Reason",
    "Recipe",
    "RewriteError",
    "Schedule",
    "ScheduleError",
    "Tried",
    "Until",
    "Width",
    "apply",
    "capture",
    "explain",
    "export_onnx",
    "grow",
    "initialiser",
    "load",
    "load_checkpoint",
    "op",
    "plan",
    "profile",
    "resize",
    "save",
    "save_checkpoint",
    "to_networkx",
    "try_widths",
    "widen",
    "widths",
]
