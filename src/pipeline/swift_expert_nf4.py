"""Loaded by ms-swift where a recipe quantizes (`external_plugins`): GLM-4.5V's routed experts become 4-bit too, each as soon as it has been read.

transformers 5 keeps a layer's experts as two 3-D parameters, and its bitsandbytes quantizer takes nn.Linear alone: 99.7 B of 107.7 B parameters would stay in bf16.
transformers reads, fuses and converts one target after the other where it quantizes while loading, so that no more than one of these parameters (gate_up_proj: 2.75 GiB
in bf16, about twice that while it is fused) ever stands unquantized beside the 4-bit rest, in host memory or on the GPU. With several processes each one reads and
quantizes for itself, on its own device.

In use, a parametrization gives `experts.gate_up_proj` in the model's precision again. The frozen weight has no gradient, but autograd keeps it for the input's: with
gradient checkpointing until that layer's backward pass is over, which dequantizes once more; without it, all layers' experts stand dequantized at its start.
"""

from typing import Any

from bitsandbytes.functional import QuantState, quantize_4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils.parametrize import register_parametrization
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeTextExperts
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")
"""Glm4vMoeTextExperts' parameters: [experts, out_features, in_features]."""


class ExpertQuantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]  # transformers is not read by mypy
    """bitsandbytes' 4-bit quantizer, for the routed experts as for the linear layers: same type, same block size, same nesting."""

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.states: dict[str, QuantState] = {}
        """What dequantizes an expert parameter, by the parameter's name; from its conversion until the model is loaded."""

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Also decides what transformers sets aside for the parameter: half a byte an element."""
        return is_expert_weight(model, param_name) or bool(super().param_needs_quantization(model, param_name, **options))

    def get_quantize_ops(self) -> "QuantizeExperts":
        return QuantizeExperts(self)

    def quantize(self, name: str, weight: Tensor) -> Parameter:
        """`weight` in 4 bits, packed: uint8 [elements / 2, 1]."""
        config = self.quantization_config
        packed, self.states[name] = quantize_4bit(
            weight.contiguous(),
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
            quant_storage=config.bnb_4bit_quant_storage,
        )
        return Parameter(packed, requires_grad=False)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        """Raises KeyError for expert weights that the checkpoint did not hold.

        bitsandbytes' own replace_parameter_4bit would also rename what is packed in the state dict, so that DeepSpeed, which leaves frozen parameters out of its
        checkpoints by their names, would write all experts into each.
        """
        for path, module in model.named_modules():
            if isinstance(module, Glm4vMoeTextExperts):
                for name in EXPERT_WEIGHTS:
                    register_parametrization(module, name, Bnb4bitParametrization(self.states.pop(f"{path}.{name}")), unsafe=True)
        return super()._process_model_after_weight_loading(model, **options)


class QuantizeExperts(Bnb4bitQuantize):  # type: ignore[misc]
    """The conversion's last step: one parameter, already fused from the checkpoint's tensors and on its device."""

    def convert(self, input_dict: dict[str, Any], model: Any = None, **options: Any) -> dict[str, Any]:
        ((name, value),) = input_dict.items()
        if not is_expert_weight(model, name):
            return dict(super().convert(input_dict, model=model, **options))
        return {name: self.hf_quantizer.quantize(name, value[0] if isinstance(value, list) else value)}


def is_expert_weight(model: Any, name: str) -> bool:
    module, parameter = get_module_from_name(model, name)
    return isinstance(module, Glm4vMoeTextExperts) and parameter in EXPERT_WEIGHTS


AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = ExpertQuantizer
