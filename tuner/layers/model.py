"""Define the tuner model, which finds and wraps the embedding, and ties wrapped heads to the embedding."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, TrainableTokensConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import _get_submodules
from torch import Tensor, nn

from tuner.layers.layer import TrainableTokensLayer
from tuner.layers.tying import further_embedding, input_embedding, output_embedding, tied_module_names, unwrap

__all__ = ["TrainableTokensModel"]

_FALLBACK = "embed_tokens"


class TrainableTokensModel(BaseTuner):
    """A model with trained token rows in its embedding and in every head that is tied to the embedding."""

    prefix: str = "trainable_tokens_"
    tuner_layer_cls = TrainableTokensLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        """Replace ``target_modules=None`` by the default modules, and remove tied heads from ``target_modules``.

        The default modules are the input embedding, any further embedding with a row per token and, with
        ``train_head``, the head. A tied head is removed even if the user listed the head, because a tied head uses the
        embedding's rows without being a target. Stock PEFT (0.21) can save but not run an adapter whose targets include
        both the embedding and a tied head.
        """
        assert isinstance(peft_config, TrainableTokensConfig)
        targets = peft_config.target_modules
        if targets is None:
            names = [_name_of(self.model, input_embedding(self.model)) or _FALLBACK]
            if getattr(peft_config, "train_head", False):
                names.append(_name_of(self.model, output_embedding(self.model)) or names[0])
            if further := _name_of(self.model, further_embedding(self.model)):
                names.append(further)
            own = self._without_tied(names)
            peft_config.target_modules = own[0] if len(own) == 1 else own
        elif not isinstance(targets, str):
            peft_config.target_modules = self._without_tied(list(targets)) or targets
        return peft_config

    def _without_tied(self, targets: list[str]) -> list[str]:
        tied = tied_module_names(self.model)
        return [name for name in targets if not any(f".{other}".endswith(f".{name}") for other in tied)]

    def inject_adapter(  # type: ignore[override]  # keywords are passed through, as in PEFT's own class
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **kwargs: Any,
    ) -> None:
        """Wrap the target modules, then wrap every module that is tied to the input embedding.

        The tied modules get no parameters of their own, but use the embedding's rows.
        """
        super().inject_adapter(
            model=model,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **kwargs,
        )
        embedding = input_embedding(model)
        if not isinstance(embedding, TrainableTokensLayer) or adapter_name not in embedding.token_indices:
            return
        for name in tied_module_names(model):
            self._tie(model, name, adapter_name, embedding)

    def _tie(self, model: nn.Module, name: str, adapter_name: str, embedding: TrainableTokensLayer) -> None:
        parent, target, target_name = _get_submodules(model, name)
        if isinstance(target, TrainableTokensLayer) and target.tied_adapter is embedding:
            return  # the head was tied when an earlier adapter was injected, and reads the new rows too
        self._create_and_replace(
            self.peft_config[adapter_name],
            adapter_name,
            unwrap(target),
            target_name,
            parent,
            current_key=name,
            tied_adapter=embedding,
        )
        # The active adapters of the embedding may differ from the new adapter. The head must use the embedding's
        # adapters.
        tied = getattr(parent, target_name)
        tied._active_adapter = embedding._active_adapter
        tied._disable_adapters = embedding._disable_adapters

    def _get_tied_target_modules(self, *args: Any, **kwargs: Any) -> list[str]:
        """Return an empty list, so that PEFT prints no warning about tied modules.

        TrainableTokensModel handles tied modules itself.
        """
        return []

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Do nothing, because PEFT's own method would only warn about tied modules when an adapter is added."""

    def _create_and_replace_dict(
        self,
        peft_config: dict[str, Any],
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        """Add the adapter to ``target`` if ``target`` is already wrapped, else wrap ``target``.

        The parameter ``peft_config`` is a dictionary, because the key ``tied_adapter`` is not a field of PEFT's
        configuration class.
        """
        options = dict(peft_config)
        if isinstance(target, TrainableTokensLayer):
            tied_adapter = options.pop("tied_adapter", None)
            target.update_layer(adapter_name, config=options, tied_adapter=tied_adapter)
        else:
            new_module = self._create_new_module(options, adapter_name, target)
            self._replace_module(parent, target_name, new_module, target)

    def _create_and_replace(  # type: ignore[override]  # rows are never put on a bare parameter
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        tied_adapter: nn.Module | None = None,
    ) -> None:
        """Add the adapter to ``target``, after wrapping ``target`` if necessary.

        PEFT calls this method for each target module. See ``_create_and_replace_dict``.
        """
        options = {**peft_config.to_dict(), "tied_adapter": tied_adapter}
        self._create_and_replace_dict(options, adapter_name, target, target_name, parent, current_key)

    @staticmethod
    def _create_new_module(
        peft_config: PeftConfig | dict[str, Any],
        adapter_name: str,
        target: nn.Module,
        tied_adapter: TrainableTokensLayer | None = None,
        **kwargs: Any,
    ) -> TrainableTokensLayer:
        """Wrap ``target`` in a layer with new rows for ``adapter_name``, or with the rows of ``tied_adapter``."""
        if isinstance(peft_config, dict):
            options = dict(peft_config)
            tied_adapter = options.pop("tied_adapter", None) or tied_adapter
        else:
            options = peft_config.to_dict()
        layer = TrainableTokensLayer(target, adapter_name, tied_adapter=tied_adapter, **kwargs)
        layer.update_layer(adapter_name, config=options, tied_adapter=tied_adapter)
        return layer

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename the tensors of an adapter file to the parameter names of the model.

        In adapter files of PEFT 0.21, the rows of a tied model are stored twice: under the name of the embedding and
        under the name of the head. Adapter files of older PEFT versions contain only the tensor of the embedding. If
        the head's tensor is missing, the embedding's rows are used for the head.
        """
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, TrainableTokensLayer)}
        keys = {id(layer): f"{name}.trainable_tokens_delta.{adapter_name}" for name, layer in layers.items()}
        for layer in layers.values():
            source = None if layer.tied_adapter is None else keys.get(id(layer.tied_adapter))
            if source in remapped:
                remapped.setdefault(keys[id(layer)], remapped[source])
        return remapped


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    if module is None:
        return None
    return next((name for name, other in model.named_modules() if other is module), None)
