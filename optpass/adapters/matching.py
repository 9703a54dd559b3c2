"""Adapter → Program: each module of the adapter is one weight of the store, or an error says why not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from optpass.adapters.adaptation import Adaptation
from optpass.adapters.keys import ModuleKey
from optpass.adapters.ldm_names import ldm_names
from optpass.adapters.reading import Adapter
from optpass.adapters.sites import SUFFIX, Site, sites
from optpass.capture.configs import DENOISERS, MODULE_OF, PIPELINE_INDEX
from optpass.errors import UserError, nearest
from optpass.ir.program import Origin, Program
from optpass.ir.weights import Expression, dtype_name

SHOWN = 5
TOWERS = ("text_model", "vision_model")
FOREIGN = ("double_blocks", "single_blocks", "joint_blocks", "input_blocks", "middle_block", "output_blocks")
"""Modules of the code that a model was published with, under other names and cut otherwise in diffusers."""


@dataclass(frozen=True)
class Refusal:
    """A key of an adapter that changes no weight, and why; ``harmless`` ones are another component's."""

    key: str
    reason: str
    harmless: bool = False


@dataclass(frozen=True)
class Matched:
    """Adaptations by the name of the weight that each changes, and the keys that are left."""

    weights: Mapping[str, Adaptation]
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Adaptable:
    """What adapters can change of a model, and where it belongs.

    ``sites`` by the path of their module; ``weights`` are all by name, of which shape and dtype count;
    ``component`` is the model's name in its pipeline, whose models are ``components``, and ``module`` the path
    that a module captured out of its model had there. ``absent`` says in a message what a module is that has
    no site. ``layout`` are paths without a site on which names in the model's original code depend.
    """

    sites: Mapping[str, Site]
    weights: Mapping[str, Expression]
    component: str = ""
    components: Sequence[str] = ()
    module: str = ""
    absent: str = "no layer that the model runs is called"
    layout: Sequence[str] = ()

    @classmethod
    def of(cls, program: Program) -> Self:
        """The linears and convolutions of a Program."""
        origin = program.origin
        component, module = belonging(origin.kind, origin.component, pipeline=origin.pipeline)
        return cls(
            sites(program),
            program.weights,
            component=component,
            components=_components(origin),
            module=module,
        )

    @classmethod
    def of_weights(cls, weights: Mapping[str, Expression]) -> Self:
        """Names and shapes alone, where no graph says what reads the weights.

        Every ``PATH.weight`` of two dimensions or more is taken for a linear's or convolution's own.
        """
        named = [name for name, weight in weights.items() if name.endswith(SUFFIX) and len(weight.shape) > 1]
        return cls({name.removesuffix(SUFFIX): Site(name, ()) for name in named}, weights)


def belonging(kind: str, component: str, *, pipeline: bool) -> tuple[str, str]:
    """What an origin of ``kind`` says of a Program: its component in the pipeline, and its path in a larger model.

    Either is empty; both for a model alone, whatever function made it.
    """
    if pipeline:
        return component, ""
    return "", component if kind.startswith(MODULE_OF) else ""


def match_adapter(adapter: Adapter, model: Adaptable, *, strict: bool = True, elsewhere: bool = False) -> Matched:
    """Find each module of ``adapter`` in ``model``, whose linears and convolutions it may change.

    Keys of another component of the pipeline are ``refused`` as harmless. With ``strict`` false the
    others that match nothing are refused too, instead of raised. With ``elsewhere`` an adapter may be about
    other components alone.

    Raises:
        UserError: a key matches nothing (the nearest module is named), does not fit the weight's shape, or is
            of a kind that is not merged; or no key at all matches.
    """
    found = _Matching(adapter, model)
    found.run()
    serious = [refusal for refusal in found.refused if not refusal.harmless]
    if serious and (strict or not found.weights):
        shown = "\n  ".join(f"{refusal.key}: {refusal.reason}" for refusal in serious[:SHOWN])
        more = f"\n  and {len(serious) - SHOWN} more" if len(serious) > SHOWN else ""
        hint = "; strict: false leaves them out" if found.weights else ""
        raise UserError(f"{adapter.path}: {len(serious)} keys cannot be merged{hint}:\n  {shown}{more}")
    if not found.weights and not elsewhere:
        refusal = found.refused[0]
        raise UserError(f"{adapter.path} changes nothing of this model: {refusal.key}: {refusal.reason}")
    return Matched(found.weights, tuple(found.refused))


@dataclass
class _Matching:
    adapter: Adapter
    model: Adaptable
    names: Mapping[str, str] = field(init=False)
    flat: Mapping[str, list[str]] = field(init=False)
    weights: dict[str, Adaptation] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    hints: int = 0

    def __post_init__(self) -> None:
        paths = self.model.sites
        original = {name: path for name, path in ldm_names([*paths, *self.model.layout]).items() if path in paths}
        self.names = {**_towers(paths), **original, **{path: path for path in paths}}
        self.flat = _flattened(self.names)
        self.own, self.inside = self.model.component, self.model.module
        keys = [*self.adapter.modules, *(module for module, _ in self.adapter.unsupported.values())]
        # Of a model alone nobody says which component it is: it is the one whose modules it has.
        self.resolved = {module.component for module in keys if self._paths(module)}

    def run(self) -> None:
        for module, adaptation in self.adapter.modules.items():
            if refusal := self._other_component(module, adaptation.key) or self._adapt(module, adaptation):
                self.refused.append(refusal)
        for key, (module, what) in self.adapter.unsupported.items():
            refusal = self._other_component(module, key)
            self.refused.append(refusal or Refusal(key, f"{what}, which is not merged{self._nearest(module)}"))

    def _adapt(self, module: ModuleKey, adaptation: Adaptation) -> Refusal | None:
        """Put ``adaptation`` to its weight, or say why not."""
        paths = self._paths(module)
        if len(paths) != 1:
            return Refusal(adaptation.key, self._unresolved(module, paths))
        site = self.model.sites[paths[0]]
        if site.doubt:
            return Refusal(adaptation.key, site.doubt)
        if site.weight in self.weights:
            other = self.weights[site.weight].key
            return Refusal(adaptation.key, f"changes {site.weight}, and so does {other!r} of the same file")
        weight = self.model.weights[site.weight]
        if not weight.dtype.is_floating_point:
            named = dtype_name(weight.dtype)
            return Refusal(adaptation.key, f"{site.weight} is {named}; merge before the model is quantized")
        try:
            adaptation.check_fits(weight.shape)
        except UserError as error:
            return Refusal(adaptation.key, f"{error} ({site.weight}); was it made for another base model?")
        self.weights[site.weight] = adaptation
        return None

    def _paths(self, module: ModuleKey) -> list[str]:
        """The modules of the Program that ``module`` may be."""
        inside = f"{self.inside}." if self.inside else ""
        if module.flat:
            return self.flat.get(module.path.removeprefix(inside.replace(".", "_")), [])
        # A model's own module may be called as a component is: transformer.h.0
        candidates = (str(module), module.path, module.path.removeprefix(inside))
        return [self.names[name] for name in candidates if name in self.names][:1]

    def _unresolved(self, module: ModuleKey, paths: list[str]) -> str:
        if paths:
            return f"the underscores of {module.path} can be {paths[0]} or {paths[1]}"
        own = sorted(name for name in self.model.weights if name.startswith(f"{module.path}."))
        if own:
            return f"{module.path} has no weight called {module.path}.weight, but {own[0]}"
        if module.path.startswith(FOREIGN):
            return (
                f"{module.path} is a name in the model's original code, and no layer here is known under it; "
                "convert the adapter with diffusers (load_lora_weights, then save_lora_weights)"
            )
        return f"{self.model.absent} {module.path}{self._nearest(module)}"

    def _nearest(self, module: ModuleKey) -> str:
        """A hint for the first few keys: more are not shown, and each is a search through all names."""
        self.hints += 1
        if self.hints > SHOWN:
            return ""
        known = {name: paths[0] for name, paths in self.flat.items()} if module.flat else self.names
        return _closest(module.path, known)

    def _other_component(self, module: ModuleKey, key: str) -> Refusal | None:
        """The refusal of a key that is about another part of the model or pipeline than the Program is."""
        named = module.component
        if self.inside and self._is_outside(module):
            return Refusal(key, f"is outside of {self.inside}, which was captured alone", harmless=True)
        if not named or self._is_own(module):
            return None
        known = self.model.components
        if named in known:
            return Refusal(key, f"belongs to component {named}; give it merge-lora under components:", harmless=True)
        if known:
            return Refusal(
                key, f"belongs to component {named}, which the pipeline does not have{nearest(named, known)}"
            )
        if self.resolved:
            return Refusal(key, f"belongs to component {named}, and this model is captured alone", harmless=True)
        return None

    def _is_outside(self, module: ModuleKey) -> bool:
        inside = self.inside.replace(".", "_") if module.flat else self.inside
        end = "_" if module.flat else "."
        return not self._paths(module) and not f"{module.path}{end}".startswith(f"{inside}{end}")

    def _is_own(self, module: ModuleKey) -> bool:
        if not self.own:
            return module.component in self.resolved
        # sd-scripts calls every denoiser a UNet.
        return module.component == self.own or {module.component, self.own} <= set(DENOISERS)


def _components(origin: Origin) -> list[str]:
    """The models of the pipeline that the Program is of; empty where it is of none."""
    if not origin.pipeline or origin.path is None or not (origin.path / PIPELINE_INDEX).is_file():
        return []
    from optpass.runtime.folder import neural_components

    return neural_components(origin.path)


def _towers(paths: Iterable[str]) -> dict[str, str]:
    """Paths with and without the tower's name, which transformers 5 took out of CLIP's single models."""
    found: dict[str, str] = {}
    for path in paths:
        head, _, rest = path.partition(".")
        names = (rest,) if head in TOWERS else tuple(f"{tower}.{path}" for tower in TOWERS)
        found |= dict.fromkeys(names, path)
    return found


def _flattened(names: Mapping[str, str]) -> dict[str, list[str]]:
    flat: dict[str, list[str]] = {}
    for name, path in names.items():
        flat.setdefault(name.replace(".", "_"), []).append(path)
    return flat


def _closest(name: str, known: Mapping[str, str]) -> str:
    """``nearest``, in the words of the Program, and nothing where no name is near: models have hundreds of modules."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {known[close[0]]!r}?" if close else ""
