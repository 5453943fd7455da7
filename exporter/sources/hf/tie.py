"""Determine which stored tensors are the input embedding and the output head, and whether the two are tied.

As in transformers, the class of the model determines which modules are the embedding and the head, and which parameters
are tied. Source: ``tie_weights`` and ``get_expanded_tied_weights_keys`` in transformers' modeling_utils.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporter.errors import BadInput, NotExpressible
from exporter.models.architecture import pattern_of
from exporter.models.module_map import ModuleMap
from exporter.sources.hf.safetensors import FileTensor
from exporter.tensors import same_bits

#: Module names of the input embedding and the output head, for models that no generated table describes.
EMBEDDINGS: Final = ("embed_tokens", "wte", "embed_in", "word_embeddings", "shared")
HEADS: Final = ("lm_head", "embed_out")

#: Model types that transformers ties whatever the value of tie_word_embeddings. In these model types,
#: tie_word_embeddings controls the scaling of the head's input.
_ALWAYS_TIED: Final = ("t5", "mt5", "umt5")

Tensors = Mapping[str, FileTensor]


@dataclass(frozen=True, slots=True)
class Tie:
    """Describes whether and how the input embedding and the output head of a checkpoint are tied.

    embedding: name of the stored embedding tensor. head: name of the stored head tensor, or None if no head is stored.
    tied: whether embedding and head have equal values. copies: names of other stored tensors that are copies of the
    embedding; old encoder-decoder checkpoints store one copy for the encoder and one for the decoder, and multi-token
    prediction layers may have a copy. head_copies: names of other stored tensors that are copies of the head.
    tied_in_config: whether the config ties embedding and head. If the config ties embedding and head, PEFT writes the
    trained embedding rows to the head, too, even if the stored head has different values. has_head: whether the model
    has an output head; a model without a head counts as tied, because no head has to be changed separately.
    """

    embedding: str
    head: str | None
    tied: bool
    copies: tuple[str, ...] = ()
    tied_in_config: bool = False
    head_copies: tuple[str, ...] = ()
    has_head: bool = True

    @property
    def duplicates(self) -> frozenset[str]:
        """Names of the stored tensors that have the embedding's values: copies of the embedding, and a tied head."""
        tied = (self.head, *self.head_copies) if self.tied and self.head else ()
        return frozenset((*self.copies, *tied))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stored tensors that are the embedding, the head, or a copy of either."""
        return (self.embedding, *self.copies, *([self.head] if self.head else []), *self.head_copies)


def find_tie(path: Path, config: Mapping[str, Any], tensors: Tensors, modules: ModuleMap | None) -> Tie:
    """Determine whether embedding and head are tied, from the class, the config and the tensors, as transformers does.

    A stored head whose values differ from the embedding is never tied. A stored head whose values equal the embedding
    is tied if the model class and the config allow the tie. modules: the map of the model's parameters, or None if the
    model class is unknown. Raises BadInput if the checkpoint stores no embedding, or if the config contradicts the
    stored tensors.
    """
    if modules is None or modules.architecture.embedding is None:
        embedding, head, copies = _by_name(path, config, tensors)
        return _tie(path, config, tensors, embedding, head, copies, _flag_by_name(config), " or ".join(HEADS))
    use = Vocabulary(modules)
    embedding, head, others = find_stored(path, tensors, modules)
    copies = []
    for param, name in others.items():
        if same_bits(tensors[embedding], tensors[name]):
            copies.append(name)
        elif config.get("is_encoder_decoder") is True and pattern_of(param) in use.tied:
            raise BadInput(f"{path}: {name}: expected the same values as {embedding}, found different values")
    copies += _further(modules, tensors, embedding, use.embedding)
    if use.head is None:
        return Tie(embedding, None, tied=True, copies=tuple(copies), tied_in_config=True, has_head=False)
    flag = True if config.get("model_type") in _ALWAYS_TIED else use.flag
    if head is None and not flag and any(use.head in pair for pair in modules.architecture.ties):
        # The head is tied to another matrix than the input embedding, as in a pair of two models.
        return Tie(embedding, None, tied=True, copies=tuple(copies), tied_in_config=True, has_head=False)
    repeated = _further(modules, tensors, head, use.head) if head else []
    return _tie(path, config, tensors, embedding, head, copies, flag, use.head, repeated)


def parameters_to_untie(config: Mapping[str, Any], modules: ModuleMap | None) -> dict[str, str]:
    """Find the parameters, besides the head, that have to be stored separately when the head is untied.

    Returns {parameter: stored tensor with the parameter's values}. The config flag that ties the head may also tie
    further parameters, such as the bias of the head or the embeddings of encoder and decoder. If the flag is false,
    transformers loads each parameter from a tensor of its own.
    """
    if modules is None or config.get("model_type") in _ALWAYS_TIED or (head := Vocabulary(modules).head) is None:
        return {}
    further = {}
    for target, source in modules.architecture.tied_with(head):
        stored = modules.stored_name(source)
        if stored is not None and target != head and target not in modules.groups and "*" not in target:
            further[target if modules.loads(target) == target else f"language_model.{target}"] = stored
    return further


def find_stored(path: Path, tensors: Tensors, modules: ModuleMap) -> tuple[str, str | None, dict[str, str]]:
    """Return (name of the stored embedding, name of the stored head or None, {further tied parameter: stored name}).

    If a checkpoint stores the head of a tied model but no embedding, the stored head is the embedding. Raises BadInput
    if the checkpoint stores neither the embedding nor a parameter tied to the embedding, and NotExpressible if the
    embedding is stored in several tensors.
    """
    use = Vocabulary(modules)
    linked = use.linked | {pattern_of(use.head or use.embedding)}
    stored = {
        param: name
        for param in modules.groups
        if pattern_of(param) in linked and (name := modules.stored_name(param)) is not None
    }
    head = stored.pop(use.head, None) if use.head and use.head != use.embedding else None
    embedding = stored.pop(use.embedding, None)
    if embedding is None and stored:
        embedding = stored.pop(min(stored))
    if embedding is None and use.head in use.linked:
        embedding, head = head, None
    if embedding is None and use.embedding in modules.groups:
        names = ", ".join(name for _, name in modules.groups[use.embedding].sources)
        raise NotExpressible(
            f"{path}: {use.embedding}",
            f"the checkpoint stores the input embedding in several tensors ({names}), which ttexport does not merge",
            instead="merge the adapter with PEFT's merge_and_unload(), and save the model with transformers",
        )
    if embedding is None:
        raise BadInput(f"{path}: expected an input embedding ({use.embedding}), found no input embedding")
    return embedding, head, dict(sorted(stored.items()))


@dataclass(frozen=True)
class Vocabulary:
    """The embedding and the head of a known model class, and the parameters that are tied to the embedding."""

    modules: ModuleMap

    @property
    def embedding(self) -> str:
        """Name of the input embedding's weight in the loaded model."""
        return f"{self.modules.architecture.embedding}.weight"

    @property
    def head(self) -> str | None:
        """Name of the output head's weight in the loaded model, or None if the model has no head."""
        head = self.modules.architecture.head
        return f"{head}.weight" if head else None

    @property
    def linked(self) -> frozenset[str]:
        """Name patterns of the embedding's weight and of all parameters that the class can tie to the embedding."""
        return _closure(self.embedding, self.modules.architecture.links)

    @property
    def tied(self) -> frozenset[str]:
        """Name patterns of the embedding's weight and of all parameters that the config ties to the embedding."""
        return _closure(self.embedding, self.modules.architecture.ties)

    @property
    def flag(self) -> bool | None:
        """Whether model class and config tie the head, or None if the config lacks ``tie_word_embeddings``."""
        if self.head is None or self.head == self.embedding:
            return True
        if self.head not in self.linked:
            return False
        return self.head in self.tied if self.modules.architecture.states_tie(self.head) else None


def _closure(start: str, pairs: list[tuple[str, str]]) -> frozenset[str]:
    reached = {pattern_of(start)}
    while more := {name for pair in pairs if reached & set(pair) for name in pair} - reached:
        reached |= more
    return frozenset(reached)


def _further(modules: ModuleMap, tensors: Tensors, name: str, parameter: str) -> list[str]:
    """Return the stored copies of the tensor ``name`` that the model class does not load."""
    known = modules.architecture.parameters
    want, leaf = tensors[name], ".".join(parameter.split(".")[-2:])
    leaves = (leaf, "head.weight") if parameter == f"{modules.architecture.head}.weight" else (leaf,)
    endings = tuple(f".{ending}" for ending in leaves)
    return sorted(
        other
        for param, group in modules.groups.items()
        for _, other in group.sources
        if f".{other}".endswith(endings)
        and other != name
        and pattern_of(param) not in known
        and same_bits(tensors[other], want)
    )


def _tie(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    embedding: str,
    head: str | None,
    copies: list[str],
    flag: bool | None,
    expected: str,
    repeated: list[str] | None = None,
) -> Tie:
    if head is None:
        if flag is False:
            raise BadInput(
                f"{path}: expected a stored head ({expected}), because the config does not tie embedding and head, "
                "found no stored head"
            )
        return Tie(embedding, None, tied=True, copies=tuple(copies), tied_in_config=True)
    tied = flag is not False and same_bits(tensors[embedding], tensors[head])
    in_config = tied if flag is None else flag
    return Tie(embedding, head, tied, tuple(copies), tied_in_config=in_config, head_copies=tuple(repeated or ()))


def _flag_by_name(config: Mapping[str, Any]) -> bool | None:
    nested = config.get("text_config")
    tables = (config, nested if isinstance(nested, dict) else config)
    values = {flag for table in tables if isinstance(flag := table.get("tie_word_embeddings"), bool)}
    # The config of a wrapper may contradict the config of its text model. In this case, only the tensors decide.
    return values.pop() if len(values) == 1 else None


def _by_name(path: Path, config: Mapping[str, Any], tensors: Tensors) -> tuple[str, str | None, list[str]]:
    """Find the embedding, its copies and the head by the module names that are usual in published checkpoints."""
    names = _named(tensors, EMBEDDINGS)
    if not names:
        raise BadInput(f"{path}: expected an input embedding ({', '.join(EMBEDDINGS)}), found no input embedding")
    first = next((name for name in names if name.endswith("shared.weight")), names[0])
    copies = [name for name in names if name != first]
    if copies and config.get("is_encoder_decoder") is not True:
        raise BadInput(f"{path}: expected one input embedding, found the tensors {', '.join(names)}")
    for name in copies:
        if not same_bits(tensors[first], tensors[name]):
            raise BadInput(f"{path}: {name}: expected the same values as {first}, found different values")
    heads = _named(tensors, HEADS)
    if len(heads) > 1:
        raise BadInput(f"{path}: expected one output head, found the tensors {', '.join(heads)}")
    return first, heads[0] if heads else None, copies


def _named(tensors: Tensors, modules: tuple[str, ...]) -> list[str]:
    endings = [[module, "weight"] for module in modules]
    return sorted(name for name in tensors if name.split(".")[-2:] in endings)
