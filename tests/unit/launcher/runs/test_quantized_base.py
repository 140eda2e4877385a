"""A linear layer in 8 bits: its values, gradients and memory; and which layers of a model become one."""

import pytest
import torch
from torch import nn

from shardlaunch import Options, UserError
from shardlaunch.launcher.runs.linear_layers import quantizable_layers
from shardlaunch.launcher.runs.lora import add_adapters
from shardlaunch.launcher.runs.quantized_base import QuantizedLinear


def _layer(*, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias).requires_grad_(False)
    layer.weight[3] = 0
    layer.weight[4] *= 1e6
    return layer


def test_values_are_those_of_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    theirs = _layer()
    mine = QuantizedLinear(theirs)
    quantization.quantize_(theirs, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    assert torch.equal(mine.integers, theirs.weight.qdata)
    assert torch.equal(mine.scales, theirs.weight.scale)
    assert torch.equal(mine.weight, theirs.weight.dequantize())


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_as_one_of_its_weights_and_keeps_none_for_its_backward_pass(bias: bool) -> None:
    layer = _layer(bias=bias)
    quantized, plain = QuantizedLinear(layer), nn.Linear(48, 32, bias=bias).requires_grad_(False)
    plain.load_state_dict({"weight": quantized.weight, **({"bias": layer.bias} if bias else {})})
    assert 0 < (plain.weight - layer.weight).abs().max() <= layer.weight.abs().max() / 255
    inputs = torch.randn(3, 5, 48)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    found, expected = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = quantized(found)
    assert torch.equal(outputs, plain(expected))
    assert {tensor.dtype for tensor in kept if tensor.numel() >= layer.weight.numel()} == {torch.int8}
    gradient = torch.randn_like(outputs)
    outputs.backward(gradient)
    plain(expected).backward(gradient)
    torch.testing.assert_close(found.grad, expected.grad)
    assert not any(parameter.requires_grad for parameter in quantized.parameters())


def test_a_layer_computes_in_the_dtype_of_autocast() -> None:
    quantized = QuantizedLinear(_layer())
    inputs = torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = quantized(inputs)
    assert outputs.dtype == torch.bfloat16
    outputs.sum().backward()
    assert inputs.grad is not None
    torch.testing.assert_close(inputs.grad, quantized.weight.sum(0).expand(5, -1), rtol=2e-2, atol=2e-2 * 1e6)


def test_which_layers_are_quantized() -> None:
    """Not the head, which is trained as a whole, and not the output layer."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=60, **size))
    ends = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [name.rpartition(".")[2] for name in quantizable_layers(llama, ())] == ends
    bert = BertForSequenceClassification(BertConfig(vocab_size=60, **size))
    assert len(quantizable_layers(bert, ("classifier",))) == 7
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2))
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    with pytest.raises(UserError, match="--lora-base-bits: GPT2LMHeadModel has no linear layers of torch's own"):
        add_adapters(gpt2, Options(lora_rank=2, lora_base_bits=8), new=())
