"""Forward hooks of a model: what they do to values becomes part of the graph, on layers too.

ensures: hooks that only collect run in a trace, so that the code can read what they collect; the graph does not call
         them. Hooks that set the weight of their own layer stay on it. One that cannot be traced is left out.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import fx, nn
from torch.utils import _pytree as pytree

from fxgrow.errors import CaptureError
from fxgrow.graph.node_meta import FOLLOWED_HOOKS
from fxgrow.graph.parametrizations import weight_hook
from fxgrow.graph.purity import is_in_place
from fxgrow.tracing.intercept import MISSING, patched

_KINDS = {"_forward_pre_hooks": "forward pre-hook", "_forward_hooks": "forward hook"}
_BACKWARD = "_backward_pre_hooks", "_backward_hooks"
#: name of the module, kind, and key in its dict of hooks
Place = tuple[str, str, int]


class ForwardHooks:
    """The hooks of one model, and what its traces have found out about them."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (*_KINDS, *_BACKWARD)
        self.hooked = [(n, m) for n, m in model.named_modules() if any(vars(m).get(kind) for kind in kinds)]
        #: hooks that a trace leaves out, with the error of one that cannot be traced
        self.left: dict[Place, tuple[Any, Exception | None]] = {}
        #: hooks that change a value
        self.followed: set[Place] = set()
        every = [(n, kind, *item) for n, m in self.hooked for kind in _KINDS for item in vars(m)[kind].items()]
        for *place, hook in every:
            if hasattr(hook, "compute_weight") or type(hook).__module__.startswith("torch.nn.utils"):
                self.left[tuple(place)] = hook, None

    @contextlib.contextmanager
    def traced(self, tracer: fx.Tracer) -> Iterator[None]:
        """While open, hooks run as `tracer` needs them; the caller restores attributes of modules."""
        for name, module in self.hooked:
            layer = tracer.is_leaf_module(module, name)
            for kind in _KINDS:
                hooks = OrderedDict[int, Any]()
                for key, hook in vars(module)[kind].items():
                    place, left = (name, kind, key), self.left.get((name, kind, key))
                    if left is None:
                        hooks[key] = self._traced(place, hook, tracer, vars(module) if layer else {})
                    elif left[1] is None and not layer:
                        hooks[key] = hook
                vars(module)[kind] = hooks
            vars(module).update({kind: OrderedDict() for kind in _BACKWARD})
        yield

    def _traced(self, place: Place, hook: Any, tracer: fx.Tracer, attributes: Mapping[str, Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            count, before = len(tracer.graph.nodes), dict(attributes)
            try:
                result = hook(*args, **kwargs)
            except Exception as error:
                self.left[place] = hook, error
                raise
            if any(value is not before.get(name) for name, value in attributes.items()):
                self.left[place] = hook, None
                raise CaptureError("A hook sets the weight of its layer.")
            found = [id(leaf) for leaf in pytree.tree_leaves(result)]
            given = [[id(leaf) for leaf in pytree.tree_leaves(value)] for value in args[1:]]
            if (result is not None and found not in given) or any(map(is_in_place, [*tracer.graph.nodes][count:])):
                self.followed.add(place)
            return result

        return run

    def own_layers(self, gm: fx.GraphModule) -> None:
        """Gives a graph layers of its own, with the same parameters, without the hooks that its nodes stand for."""
        if not self.hooked:
            return
        names, modules = {id(m): n for n, m in self.hooked}, dict(gm.named_modules(remove_duplicate=False))
        called = {str(node.target) for node in gm.graph.find_nodes(op="call_module")}
        own: dict[int, nn.Module] = {}  # by the user's: layers with two names stay one
        for path, module in modules.items():
            if id(module) not in names or not (path in called or weight_hook(module, "weight")):
                continue
            parent: nn.Module = gm
            parts = path.split(".")
            for i, part in enumerate(parts, 1):
                theirs = modules[".".join(parts[:i])]
                if id(theirs) not in own:
                    own[id(theirs)] = child = copy.copy(theirs)
                    child._modules = dict(child._modules)
                parent._modules[part] = parent = own[id(theirs)]
            for kind in _KINDS:
                places = [(names[id(module)], kind, key) for key in vars(module)[kind]]
                kept = [place[2] for place in places if place in self.left and self.left[place][1] is None]
                setattr(parent, kind, OrderedDict((key, vars(module)[kind][key]) for key in kept))
        gm.meta[FOLLOWED_HOOKS] = {n: [k for other, _, k in self.followed if other == n] for n, *_ in self.followed}

    @contextlib.contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """An error inside the block says which hook the graph lacks, if there is one."""
        try:
            yield
        except CaptureError as error:
            for (name, kind, _), left in self.left.items():
                if left[1] is not None:
                    what = f"{_KINDS[kind]} {getattr(left[0], '__qualname__', type(left[0]).__name__)}"
                    raise CaptureError(
                        f"The {what} on {name or 'the model'!r} changes what the model computes, and "
                        f"its code cannot be traced: {left[1]}"
                    ) from error
            raise


def call_with_hooks(module: nn.Module, call: Callable[[], Any], record: Callable[..., Any]) -> Any:
    """Calls a module with its hooks, where `record` takes the place of its `forward`."""
    own = vars(module).get("forward", MISSING)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with patched([(vars(module), "forward", own)]):
            return record(args, kwargs)

    with patched([(vars(module), "forward", forward)]):
        return call()
