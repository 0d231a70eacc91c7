"""fxgrow: makes any PyTorch network wider where it needs it, while it learns."""

from fxgrow.analysis.analyse import widths
from fxgrow.axes.records import Reason, Width
from fxgrow.checkpoints.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fxgrow.checkpoints.model_file import load, resize, save
from fxgrow.errors import (
    CaptureError,
    ExportError,
    FileError,
    FxgrowError,
    FxgrowWarning,
    LossWarning,
    MissingExtraError,
    PlanError,
    ProfileError,
    RewriteError,
    ScheduleError,
    StaleModelWarning,
)
from fxgrow.initialisers.registry import Proposal, initialiser
from fxgrow.onnx_export import export_onnx
from fxgrow.ops import op
from fxgrow.pipeline.explain import Explanation, explain
from fxgrow.pipeline.grow import grow
from fxgrow.pipeline.growth_record import Growth
from fxgrow.pipeline.plan import plan
from fxgrow.pipeline.profile import profile
from fxgrow.pipeline.profile_record import Profile
from fxgrow.pipeline.try_widths import Tried, try_widths
from fxgrow.pipeline.widen import apply, widen
from fxgrow.report.bottleneck import Bottleneck
from fxgrow.report.networkx import to_networkx
from fxgrow.rewriting.plan import Plan
from fxgrow.statistics.mergeable import Moments
from fxgrow.storage.recipe import Recipe
from fxgrow.tracing.capture import capture
from fxgrow.training.grower import Grower
from fxgrow.training.history import Event, History
from fxgrow.training.schedule import Either, Schedule, Until
from fxgrow.training.schedules import Every, LayerByLayer, OnBottleneck, OnPlateau

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
    "FxgrowWarning",
    "Grower",
    "Growth",
    "History",
    "LayerByLayer",
    "LossWarning",
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
    "StaleModelWarning",
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
