"""Says in words what the schema allows at a key, and which key a pydantic error location means.

Everything here is read from the schema's own annotations, so a new key or section needs no change in this module.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as at
from pydantic import BaseModel, Discriminator
from pydantic.fields import FieldInfo

MAX_SHOWN_CHARS = 60


@dataclass(frozen=True)
class TypeHere:
    """The type at one place of the schema, with its constraints taken out of ``Annotated``."""

    annotation: Any
    metadata: tuple[Any, ...]

    @staticmethod
    def of_field(field: FieldInfo) -> TypeHere:
        return TypeHere.of(field.annotation, tuple(field.metadata))

    @staticmethod
    def of(annotation: Any, metadata: tuple[Any, ...] = ()) -> TypeHere:
        while get_origin(annotation) is Annotated:
            annotation, *inner = get_args(annotation)
            metadata = (*metadata, *inner)
        return TypeHere(annotation, metadata)

    def alternatives(self) -> list[TypeHere]:
        """The members of a union, or the type itself; None is a member of its own."""
        if get_origin(self.annotation) in (Union, types.UnionType):
            return [TypeHere.of(member, self.metadata) for member in get_args(self.annotation)]
        return [self]

    def model(self) -> type[BaseModel] | None:
        """The section here, if there is exactly one."""
        models = self._models()
        return models[0] if len(models) == 1 else None

    def item(self) -> TypeHere | None:
        """What the list here holds, if this is a list."""
        for member in self.alternatives():
            if get_origin(member.annotation) is list:
                return TypeHere.of(get_args(member.annotation)[0])
        return None

    def tagged_union(self) -> TaggedUnion | None:
        """The union of sections here, told apart by one key with a literal value."""
        models = self._models()
        if len(models) < 2:
            return None
        tag_key = next(name for name in models[0].model_fields if all(_tag_of(model, name) for model in models))
        default = None
        for entry in self.metadata:
            if isinstance(entry, Discriminator) and callable(entry.discriminator):
                default = str(entry.discriminator({}))  # the branch that a section without its tag means
        return TaggedUnion(tag_key, {str(_tag_of(model, tag_key)): model for model in models}, default)

    def allows_null(self) -> bool:
        return any(member.annotation is type(None) for member in self.alternatives())

    def _models(self) -> list[type[BaseModel]]:
        members = [member.annotation for member in self.alternatives()]
        return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


@dataclass(frozen=True)
class TaggedUnion:
    """Sections of which one is chosen by the value of ``tag_key``."""

    tag_key: str
    models: Mapping[str, type[BaseModel]]
    default: str | None


def _tag_of(model: type[BaseModel], name: str) -> Any:
    field = model.model_fields.get(name)
    values = get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    return values[0] if len(values) == 1 else None


def join_or(words: Sequence[str]) -> str:
    """``a``, ``a or b``, ``a, b or c``."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else list(words))


def shown(value: Any) -> str:
    """A value as the user would recognise it, in one short line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_SHOWN_CHARS else text[: MAX_SHOWN_CHARS - 3] + "..."


def allowed(here: TypeHere) -> str:
    """What may stand here, e.g. ``a whole number >= 1 or null``."""
    union = here.tagged_union()
    if union is not None:
        return f"a section with {union.tag_key}: {join_or(list(union.models))}"
    return join_or([words for member in here.alternatives() for words in _allowed_plain(member)])


def _allowed_plain(here: TypeHere) -> list[str]:
    plain = {type(None): "null", bool: "true or false", str: "text", int: "a whole number", float: "a number"}
    if get_origin(here.annotation) is Literal:
        return [str(value) for value in get_args(here.annotation)]
    if get_origin(here.annotation) is dict:
        return ["a section"]  # of keys that are not this schema's
    item, model = here.item(), here.model()
    if item is not None:
        entry = item.model()
        entries = f"sections with {_keys(entry)}" if entry is not None else allowed(item)
        return [f"a list{_bounds(here.metadata)} of {entries}"]
    if model is not None:
        return [f"a section with {_keys(model)}"]
    bounds = "" if here.annotation in (type(None), bool) else _bounds(here.metadata)
    return [plain.get(here.annotation, str(here.annotation)) + bounds]


def _keys(model: type[BaseModel]) -> str:
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    optional = [name for name in model.model_fields if name not in required]
    if not required:
        return f"any of the keys {', '.join(optional)}"
    return f"the keys {', '.join(required)}" + (f" (and optionally {', '.join(optional)})" if optional else "")


def _bounds(metadata: Sequence[Any]) -> str:
    parts = []
    for entry in metadata:
        match entry:
            case at.Ge(ge=bound):
                parts.append(f">= {bound}")
            case at.Gt(gt=bound):
                parts.append(f"> {bound}")
            case at.Le(le=bound):
                parts.append(f"<= {bound}")
            case at.Lt(lt=bound):
                parts.append(f"< {bound}")
            case at.MultipleOf(multiple_of=factor):
                parts.append(f"divisible by {factor}")
            case at.MinLen(min_length=1):
                parts.append("(not empty)")
            case at.MinLen(min_length=length):
                parts.append(f"(at least {length})")
    return " " + " and ".join(parts) if parts else ""


def locate(root: type[BaseModel], location: Sequence[int | str]) -> tuple[str, TypeHere, FieldInfo | None]:
    """Turns a pydantic error location into the dotted key that the user wrote.

    Pydantic's locations also name the branch of a union that it tried (``method.lora.r``,
    ``target_modules.list[str]``); no such key exists in the file.

    Returns:
        The dotted key, the type at it, and its field (None for an entry of a list).
    """
    key: list[str] = []
    here = TypeHere.of(root)
    field: FieldInfo | None = None
    for part in location:
        union, model, item = here.tagged_union(), here.model(), here.item()
        if union is not None and part in union.models:
            here = TypeHere.of(union.models[str(part)])
        elif model is not None and part in model.model_fields:
            key.append(str(part))
            field = model.model_fields[str(part)]
            here = TypeHere.of_field(field)
        elif item is not None and isinstance(part, int):
            key.append(str(part))
            here, field = item, None
        else:
            break  # the name of a branch of a plain union; nothing that the user wrote lies below it
    return ".".join(key), here, field


def every_key(here: TypeHere, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of the schema below ``here``: (name, dotted key); an entry of a list is written ``<i>``."""
    union, model, item = here.tagged_union(), here.model(), here.item()
    models = list(union.models.values()) if union is not None else [model] if model is not None else []
    for section in models:
        for name, field in section.model_fields.items():
            dotted = f"{prefix}.{name}" if prefix else name
            yield name, dotted
            yield from every_key(TypeHere.of_field(field), dotted)
    if item is not None:
        yield from every_key(item, f"{prefix}.<i>")
