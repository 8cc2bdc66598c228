"""Public API: patch, unpatch, patched, explain, supported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from .. import _backend, _checks
from ..context_parallel import Context
from . import (
    cogvideox_transformer,
    cogvideox_vae,
    forward_swap,
    hunyuan_video,
    mochi,
    wan_transformer,
    wan_vae,
)
from .registry import Family, ModulePatch
from .report import Report, path
from .state import Options, Patch, Site

MODES = ("exact", "fast")
FAMILIES: tuple[Family, ...] = (
    cogvideox_transformer.FAMILY,
    cogvideox_vae.FAMILY,
    hunyuan_video.FAMILY,
    mochi.FAMILY,
    wan_transformer.FAMILY,
    wan_vae.FAMILY,
)


class UnsupportedModelError(TypeError):
    """Raised for an object that `patch` does not support, or not in this form."""


def patch(
    obj: Any,
    only: Sequence[str] | None = None,
    mode: str = "exact",
    strict: bool = True,
    *,
    backend: str = "auto",
    context: Any = None,
) -> Report:
    """Use the kernels in a pipeline, a transformer or a VAE of diffusers, in place: only in this
    object, and without a change of its weights, their names or its classes.

    Args:
        obj: a pipeline, or a model that `supported()` lists; one under `torch.compile` too.
        only: names of ops, or of groups of them ("transformer", "vae"), to use; None: all.
        mode: "exact": ops that only move or reorder data give the same bits in fp32, and all others
            stay within the project's error bound; "fast" also takes algorithms whose bits differ,
            all within that bound.
        strict: raise if `obj`, or anything of diffusers in it, is not supported; otherwise leave it
            unchanged and list it in the report.
        backend: of every op: "auto", "kernel" or "reference".
        context: ranks that share each sequence of a CogVideoX transformer: a process group, a
            device mesh of one dimension, or a `Context`, on each of its ranks. Each rank then gives
            the whole prediction.

    Returns:
        A report to print; its counts go on with every call. Patching again with the same options
        changes nothing, and with others replaces the patch.

    Raises:
        UnsupportedModelError: see `strict`; or no model in `obj` can share a sequence, or not as it
            is. Nothing has been changed.
        ValueError: an unknown name in `only`, `mode` or `backend`.
    """
    _checks.choice("patch", "mode", mode, MODES)
    _checks.choice("patch", "backend", backend, _backend.BACKENDS)
    models, skipped = _models(obj)
    if strict and skipped:
        raise _unsupported("patch", skipped, "; strict=False leaves it as it is")
    wanted = {name: _wanted(model.family, only) for name, model in models.items()}
    _check_only(only, models)
    if context is not None and not isinstance(context, Context):
        if not hasattr(context, "get_group") and not hasattr(context, "group_name"):
            raise TypeError(
                "patch: context must be a process group, a device mesh of one dimension or a "
                f"Context; got {_named(context)}"
            )
        context = Context.of(context)
    plans = {
        name: _Plan(model, wanted[name], mode, backend, context if model.family.shares else None)
        for name, model in models.items()
        if wanted[name]
    }
    refused = {
        path(name, of): reason
        for name, plan in plans.items()
        for of, reason in plan.patch.refused.items()
    }
    if strict and refused:
        raise UnsupportedModelError(f"patch: {_listed(refused)}. strict=False leaves it as it is")
    if context is not None:
        _check_context(plans)
    for name, plan in plans.items():
        if _options(models[name].module) != plan.patch.options:
            plan.apply()
    return _report(obj, models, skipped)


def unpatch(obj: Any) -> None:
    """Restore every forward that `patch` replaced; hooks that were added since stay.

    Does nothing to a model that is not patched. A model that several pipelines share is unpatched
    for all of them. Raises UnsupportedModelError for an object without a supported model.
    """
    models, skipped = _models(obj)
    if not models:
        raise _unsupported("unpatch", skipped)
    for model in models.values():
        _undo(model)


@contextmanager
def patched(obj: Any, *args: Any, **options: Any) -> Iterator[Report]:
    """Context manager: `patch`, and afterwards the earlier patch, or none, even after an error."""
    models, _ = _models(obj)
    before = {name: _options(model.module) for name, model in models.items()}
    try:
        yield patch(obj, *args, **options)
    finally:
        for name, model in models.items():
            ops = before[name]
            if _options(model.module) != ops:
                _undo(model)
                if ops is not None:
                    _Plan(model, *ops).apply()


def explain(obj: Any) -> Report:
    """The report of `patch`: what is patched in `obj`, and for each op the calls of the kernel, of
    the reference and of the model's own forward, with reasons."""
    return _report(obj, *_models(obj))


@dataclass(frozen=True)
class Support:
    """One op in one supported model."""

    model: str
    op: str
    does: str
    bits: bool  # the same ones in mode "exact" in fp32

    def __str__(self) -> str:
        same = "the same bits" if self.bits else "within tolerance"
        return f"{self.model:<30} {self.op:<10} {same:<16} {self.does}"


class SupportTable(tuple[Support, ...]):
    """All supported models and ops; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def supported() -> SupportTable:
    """All models that `patch` supports, with their ops."""
    return SupportTable(
        Support(model, op, does, op in family.exact)
        for family in FAMILIES
        for model in family.models
        for op, does in family.ops.items()
    )


# --- finding ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model of diffusers and its family."""

    module: Any
    family: Family


class _Plan:
    """The changes to one model; nothing has been changed."""

    def __init__(
        self,
        model: Model,
        ops: tuple[str, ...],
        mode: str,
        backend: str,
        context: Context | None,
    ) -> None:
        self.model = model
        self.patch = Patch(type(model.module).__name__, ops, mode, backend, context)
        self.sites: list[tuple[nn.Module, ModulePatch, Site]] = []
        for name, module in model.module.named_modules():
            kind = model.family.module_patch(module)
            if kind is None or not set(kind.ops) & set(ops):
                continue
            reason = kind.refuses(module)
            if reason:
                self.patch.refused[name] = reason
                continue
            places = kind.ops_of(name, module, ops)
            self.sites.append((module, kind, Site(self.patch, name, places)))

    def apply(self) -> None:
        _undo(self.model)
        self.patch.sites = [site for *_, site in self.sites]
        self.model.module.__dict__["_cogvx_patch"] = self.patch
        for module, kind, site in self.sites:
            module.__dict__["_cogvx"] = site
            forward_swap.replace(module, kind.forward)
        self.model.family.prepare(self.model.module, self.patch)


def _undo(model: Model) -> None:
    if model.module.__dict__.pop("_cogvx_patch", None) is None:
        return
    model.family.undo(model.module)
    for module in model.module.modules():
        if module.__dict__.pop("_cogvx", None) is not None:
            forward_swap.restore(module)


def _models(obj: Any) -> tuple[dict[str, Model], dict[str, str]]:
    """Supported models in `obj` by name, and the reason for each unsupported part of diffusers in
    it; for an object without any, the reason."""
    obj = _unwrapped(obj)
    components = getattr(obj, "components", None)
    parts = {}
    if isinstance(obj, nn.Module):
        parts = {"": obj}
    elif isinstance(components, Mapping):
        parts = {n: _unwrapped(x) for n, x in components.items() if isinstance(x, nn.Module)}
    models = {}
    skipped = {}
    for name, part in parts.items():
        model = model_of(part)
        if model:
            models[name] = model
        elif not name or type(part).__module__.startswith("diffusers."):
            skipped[name or "obj"] = f"{type(part).__name__} is not supported"
    if not models and not skipped:
        skipped = {"obj": f"{_named(obj)} has no model of diffusers in it"}
    return models, skipped


def _named(obj: Any) -> str:
    """Type of an object, for a message: a class is often passed instead of an instance."""
    return f"the class {obj.__name__}" if isinstance(obj, type) else f"{type(obj).__name__}"


def _unsupported(where: str, skipped: Mapping[str, str], hint: str = "") -> UnsupportedModelError:
    return UnsupportedModelError(f"{where}: {_listed(skipped)}. Supported: {_names()}{hint}")


def _unwrapped(obj: Any) -> Any:
    """The module that `torch.compile` wrapped, or the object itself."""
    compiled = isinstance(obj, nn.Module) and "_orig_mod" in obj._modules
    return obj._modules["_orig_mod"] if compiled else obj


def model_of(obj: Any) -> Model | None:
    """A supported model, under `torch.compile` too; None for all else."""
    module = _unwrapped(obj)
    names = {b.__name__ for b in type(module).__mro__ if b.__module__.startswith("diffusers.")}
    family = next((family for family in FAMILIES if names & set(family.models)), None)
    return Model(module, family) if family else None


def _wanted(family: Family, only: Sequence[str] | None) -> tuple[str, ...]:
    if only is None:
        return tuple(family.ops)
    return tuple(op for op in family.ops if op in only or family.group in only)


def _check_only(only: Sequence[str] | None, models: Mapping[str, Model]) -> None:
    if only is None:
        return
    if isinstance(only, str):
        raise ValueError(f'patch: only must be a list of names, such as ["{only}"]; got "{only}"')
    families = [model.family for model in models.values()] or FAMILIES
    known = {name for family in families for name in (family.group, *family.ops)}
    unknown = sorted(set(only) - known)
    if unknown or not only:
        raise ValueError(
            f"patch: only must name some of {', '.join(sorted(known))}; "
            f"got {', '.join(unknown) or 'none'}"
        )


def _check_context(plans: Mapping[str, _Plan]) -> None:
    """Raises UnsupportedModelError unless each transformer that takes a context can share it."""
    sharing = [plan for plan in plans.values() if plan.model.family.shares]
    if not sharing:
        able = sorted({name for family in FAMILIES if family.shares for name in family.models})
        found = ", ".join(plan.patch.model for plan in plans.values()) or "nothing to patch"
        raise UnsupportedModelError(
            f"patch: context must be for a {' or '.join(able)}; got {found}"
        )
    for plan in sharing:
        shares = plan.model.family.shares
        reason = shares(plan.model.module, plan.patch) if shares else None
        if reason:
            raise UnsupportedModelError(f"patch: context: {reason}")


def _options(module: Any) -> Options | None:
    patch = module.__dict__.get("_cogvx_patch")
    return patch.options if patch else None


def _report(obj: Any, models: Mapping[str, Model], skipped: Mapping[str, str]) -> Report:
    patches = {
        name: model.module._cogvx_patch
        for name, model in models.items()
        if _options(model.module) is not None
    }
    return Report(_named(_unwrapped(obj)), patches, skipped)


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _names() -> str:
    return ", ".join(sorted({model for family in FAMILIES for model in family.models}))
