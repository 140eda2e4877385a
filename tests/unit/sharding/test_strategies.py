"""Gradients, buffers, precision, and the choice of a strategy."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn

from shardlaunch import UserError
from shardlaunch.sharding.buffers import BufferMean
from shardlaunch.sharding.data_parallel import DataParallel
from shardlaunch.sharding.environment import read_environment
from shardlaunch.sharding.gradients import GradientBuckets
from shardlaunch.sharding.precision import LossScale, apply_precision, resolve_precision
from shardlaunch.sharding.replicated import Replicated
from shardlaunch.sharding.resolve import check_ranks, resolve_strategy
from shardlaunch.sharding.world import World, threads_per_rank

ALONE = World()
CPU = torch.device("cpu")
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def _sgd(parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for _, parameter in parameters], lr=0.1, momentum=0.9)


def test_gradients_equal_plain_ones_in_buckets_of_any_size() -> None:
    inputs = torch.rand(6, 4)
    plain, bucketed = _net(), _net()
    for bucket_bytes in (1, 100, 1 << 20):
        buckets = GradientBuckets(bucketed.parameters(), world=ALONE, bucket_bytes=bucket_bytes)
        plain.zero_grad()
        for net in (plain, bucketed):
            net(inputs).square().sum().backward()
            net(inputs).abs().sum().backward()
        for p, q in zip(plain.parameters(), bucketed.parameters(), strict=True):
            assert p.grad is not None
            assert q.grad is not None
            assert torch.equal(p.grad, q.grad)
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        assert buckets.norm() == pytest.approx(norm.item())
        buckets.zero()
        assert all(p.grad is not None and not p.grad.any() for p in bucketed.parameters())


def test_clipping() -> None:
    strategy = Replicated(_net(), _sgd, world=ALONE)
    strategy.backward(strategy.model(torch.rand(6, 4)).square().sum(), factor=8.0, last=True)
    norm = strategy.finish_gradients(unscale=1 / 8, max_norm=0.01)
    assert norm > 0.01
    assert strategy.gradients.norm() == pytest.approx(0.01)


def test_an_optimizer_that_lacks_a_parameter_is_refused() -> None:
    def forgetful(parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([parameter for _, parameter in list(parameters)[:-1]], lr=0.1)

    with pytest.raises(UserError, match=r"2\.bias is missing"):
        Replicated(_net(), forgetful, world=ALONE)


def test_data_parallel_with_several_replicas_is_the_same_run() -> None:
    """Three replicas on the CPU stand in for three GPUs."""
    one = Replicated(_net(), _sgd, world=ALONE)
    many = DataParallel(_net(), _sgd, world=ALONE, devices=[CPU] * 3)
    for step in range(3):
        micro_batches = torch.rand(5, 6, 4, generator=torch.Generator().manual_seed(step))
        for strategy in (one, many):
            buffers = BufferMean(strategy.replicas, world=ALONE)
            buffers.begin_step()
            for slot, inputs in enumerate(micro_batches):
                replica = strategy.replicas[slot % len(strategy.replicas)]
                strategy.backward(replica(inputs).square().sum(), factor=1 / 30, last=slot == 4)
                buffers.end_micro_batch(replica, index=slot, weight=1)
            strategy.finish_gradients(unscale=1.0, max_norm=1.0)
            strategy.optimizer_step()
            buffers.end_step(num_micro_batches=5)
    for name, expected in one.model.state_dict().items():
        for replica in many.replicas:
            torch.testing.assert_close(replica.state_dict()[name], expected, msg=name)


def test_buffers_become_the_mean_of_the_micro_batches() -> None:
    net = nn.BatchNorm1d(2)
    buffers = BufferMean([net], world=ALONE)
    buffers.begin_step()
    for index, (value, weight) in enumerate([(1.0, 1), (3.0, 1), (100.0, 0)]):
        net(torch.full((4, 2), value))
        buffers.end_micro_batch(net, index=index, weight=weight)
    buffers.end_step(num_micro_batches=2)
    assert net.running_mean is not None
    assert net.num_batches_tracked is not None
    assert net.running_mean.tolist() == pytest.approx([0.2, 0.2])
    assert net.num_batches_tracked.item() == 1


def test_loss_scale_halves_at_overflow_and_grows_after_good_steps() -> None:
    scale = LossScale(value=8.0, growth_interval=2)
    scale.update(overflow=True)
    assert scale.value == 4.0
    scale.update(overflow=False)
    scale.update(overflow=False)
    assert scale.value == 8.0
    scale.value = 2.0**-14
    with pytest.raises(UserError, match="every loss scale"):
        scale.update(overflow=True)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_precision_in_force_is_the_one_asked_for(name: str) -> None:
    precision = apply_precision(name, CPU)
    with precision.forward_context():
        product = nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2))
    assert product.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert (precision.loss_scale is not None) == (name == "fp16")


def test_precision_sources() -> None:
    assert resolve_precision("auto", None) == resolve_precision("auto", "no") == "fp32"
    assert resolve_precision("auto", "bf16") == "bf16"
    assert resolve_precision("bf16", "no") == "bf16"
    with pytest.raises(UserError, match=r"fp32.*bf16"):
        resolve_precision("fp32", "bf16")
    with pytest.raises(UserError, match="fp7"):
        resolve_precision("fp7", None)
    with pytest.raises(UserError, match="fp9"):
        resolve_precision("auto", "fp9")
    with pytest.raises(UserError, match=r"fp8: needs a GPU of compute capability 8\.9"):
        apply_precision(resolve_precision("auto", "fp8"), CPU)


@pytest.mark.parametrize(
    ("option", "variables", "expected"),
    [
        ("auto", {}, "single"),
        ("auto", TORCHRUN, "ddp"),
        ("dp", {}, "dp"),
        *((name, {}, name) for name in ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")),
        ("auto", {"SHARDLAUNCH_STRATEGY": "dp"}, "dp"),
        ("ddp", {**TORCHRUN, "SHARDLAUNCH_STRATEGY": "ddp"}, "ddp"),
    ],
)
def test_strategy(option: str, variables: dict[str, str], expected: str) -> None:
    assert resolve_strategy(option, read_environment(variables)) == expected


@pytest.mark.parametrize(
    ("option", "variables", "complaint"),
    [
        ("nope", {}, "unknown strategy 'nope'"),
        ("single", TORCHRUN, "one process"),
        ("hsdp", TORCHRUN, "at least 4 ranks, or for one; started: 2"),
        ("dp", TORCHRUN, "one process"),
        ("ddp", {**TORCHRUN, "SHARDLAUNCH_STRATEGY": "single"}, "two strategies"),
        ("ddp", {**TORCHRUN, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "two strategies"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x'"),
        ("auto", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 contradict"),
        ("auto", {**TORCHRUN, "MASTER_PORT": "0"}, "--standalone"),
        ("auto", {**TORCHRUN, "MASTER_PORT": "99999"}, "MASTER_PORT=99999 is no port"),
        ("auto", {"RANK": "1"}, "RANK=1 is set, but no WORLD_SIZE"),
        ("auto", {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but no RANK"),
        ("auto", {"RANK": "", "WORLD_SIZE": ""}, "RANK is set to nothing"),
        ("auto", {"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
        ("auto", {**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2 and 2 ranks on this machine"),
        ("auto", {"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS=0 must be at least 1"),
        ("auto", {**TORCHRUN, "SHARDLAUNCH_JOIN_TIMEOUT_S": "-5"}, "SHARDLAUNCH_JOIN_TIMEOUT_S=-5 must be"),
    ],
)
def test_strategies_that_cannot_be(option: str, variables: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        resolve_strategy(option, read_environment(variables))


FSDP = {**TORCHRUN, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
DEEPSPEED = {**TORCHRUN, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def test_what_accelerates_configuration_says_of_a_strategy() -> None:
    plain = read_environment(FSDP)
    assert (plain.accelerate_strategy, plain.layer_classes, plain.cpu_offload) == ("fsdp2", (), False)
    assert plain.reshard_after_forward
    replicas = {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4"}
    full = read_environment(
        {
            **FSDP,
            **replicas,
            "WORLD_SIZE": "8",
            "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer,BertEmbeddings",
            "FSDP_RESHARD_AFTER_FORWARD": "false",
            "FSDP_OFFLOAD_PARAMS": "true",
        }
    )
    assert (full.accelerate_strategy, full.shard_ranks) == ("hsdp", 4)
    assert full.layer_classes == ("BertLayer", "BertEmbeddings")
    assert (full.reshard_after_forward, full.cpu_offload) == (False, True)
    offload = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "cpu" for what in ("OPTIMIZER", "PARAM")}
    zero = read_environment({**DEEPSPEED, **offload})
    assert (zero.accelerate_strategy, zero.cpu_offload) == ("zero3", True)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({**FSDP, "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "dp_replicate_size"),
        ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
        ({**FSDP, "PARALLELISM_CONFIG_TP_SIZE": "2"}, "parallelism_config_tp_size"),
        ({**FSDP, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP"),
        ({**FSDP, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--compile"),
        ({**FSDP, "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2"}, "2 replicas x 1 shards on 2 ranks"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "deepspeed_config_file"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "both or none"),
        ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, "nvme"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}, "--max-grad-norm"),
        ({**DEEPSPEED, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "--global-batch-size"),
    ],
    ids=str,
)
def test_settings_of_accelerates_configuration_that_are_not_supported(
    variables: dict[str, str], complaint: str
) -> None:
    with pytest.raises(UserError, match=f"not supported in accelerate's configuration: .*{complaint}"):
        read_environment(variables)


def test_requested_ranks_are_compared_with_those_in_effect() -> None:
    two = World(rank=1, size=2)
    check_ranks(read_environment({**TORCHRUN, "SHARDLAUNCH_RANKS": "2"}), two, 2)
    with pytest.raises(UserError, match="3 ranks were requested, but 2"):
        check_ranks(read_environment({**TORCHRUN, "SHARDLAUNCH_RANKS": "3"}), two, 2)
    with pytest.raises(UserError, match="accelerate 1"):
        check_ranks(read_environment(TORCHRUN), two, 1)
    lone = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UserError, match="started one"):
        check_ranks(read_environment(lone), ALONE, 1)


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardlaunch.sharding.world.available_cores", lambda: 8)
    two = World(size=2, local_ranks=range(2), num_on_cores=2)
    assert threads_per_rank(0, read_environment({}), ALONE) == 8
    assert threads_per_rank(0, read_environment({**TORCHRUN, "OMP_NUM_THREADS": "1"}), two) == 4
    assert threads_per_rank(0, read_environment({**TORCHRUN, "OMP_NUM_THREADS": "3"}), two) == 3
    assert threads_per_rank(1, read_environment({**TORCHRUN, "OMP_NUM_THREADS": "3"}), two) == 1
