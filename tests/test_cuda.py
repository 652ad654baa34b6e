"""What a CUDA GPU would refuse or wait for, on a simulated device (tests/simulated_cuda.py)."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import checkpoints
from simulated_cuda import CudaTensor, SimulatedCuda

import train
from compute.device import choose_precision, get_device
from config import Config
from experiments import compare, head_importance, step_table
from interpret.interventions import fixed_pattern, intervene
from interpret.live import gradient_times_input, inside_head, translate_scene
from interpret.trace import record_trace
from runs.checkpoint import load_checkpoint
from search import CHECK_EVERY
from train import train_model
from training.state import make_optimizer
from translate import CachedDecoder, Translator

PER_SEARCH = 7  # waits per batch: uploads of sources and limits, downloads of limits and results


@pytest.fixture
def small_config(tiny_config: Config) -> Config:
    """Two epochs of four batches; untrained models translate up to the limit of 16 tokens."""
    lines = Path(tiny_config.datasource).read_text("utf8").splitlines(keepends=True)
    Path(tiny_config.datasource).write_text("".join(lines[:60]), "utf8")
    small = {"d_model": 16, "d_ff": 16, "seq_len": 16, "batch_tokens": 160, "validation_sentences": 2}
    return replace(tiny_config, **small, device="auto")


def waits_of_calls(monkeypatch, gpu: SimulatedCuda, owner, name: str) -> list[list[str]]:
    """The waits in each call of a function from now on."""
    function, found = getattr(owner, name), []

    def observed(*args, **kwargs):
        before = len(gpu.waits)
        result = function(*args, **kwargs)
        found.append(gpu.waits[before:])
        return result

    monkeypatch.setattr(owner, name, observed)
    return found


VARIANTS = {
    "bf16, EMA": {"ema_decay": 0.9},
    "fp32, no clipping": {"precision": "fp32", "clip_norm": 0.0},
    "fp16": {"precision": "fp16"},
    "R-Drop, accumulation": {"rdrop_alpha": 5.0, "accumulation_steps": 2},
    "BPE-dropout, shared vocabulary": {
        "tokenizer": "bpe",
        "vocab_size": 300,
        "shared_vocab": True,
        "share_embeddings": "all",
        "bpe_dropout": 0.1,
        "seq_len": 64,
        "batch_tokens": 1_000,
        "validation_sentences": 0,
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_host_waits_only_when_it_logs_validates_or_saves(small_config, name, monkeypatch):
    with SimulatedCuda() as gpu:
        steps, checks, losses = (
            waits_of_calls(monkeypatch, gpu, owner, function)
            for owner, function in (
                (train, "train_step"),
                (train.TrainingLog, "check_finite"),
                (train, "validation_loss"),
            )
        )
        state = train_model(replace(small_config, **VARIANTS[name]))
    assert isinstance(next(state.model.parameters()), CudaTensor)
    assert state.progress.step == len(steps) >= 4
    assert not any(steps), steps
    assert 2 <= sum(map(len, checks)) <= len(steps) // train.LOG_EVERY + 2  # every tenth step, and after each epoch
    assert [len(waits) for waits in losses] == [1, 1]
    others = {wait.split(": ")[0].split()[1] for wait in gpu.waits}
    set_up, saved = {"create", "load_state_dict"}, {"save_checkpoint", "state_dict", "not_finite", "weights_crc32"}
    searched = {"decoder_and_limits", "greedy_decode", "remaining_rows"}
    assert others <= set_up | saved | searched | {"check_finite", "validation_loss", "write"}


@pytest.fixture
def gpu_translator(small_config) -> tuple[SimulatedCuda, Translator]:
    """A model trained for one step."""
    with SimulatedCuda() as gpu:
        train_model(replace(small_config, max_steps=1, seq_len=32, validation_sentences=0))
        yield gpu, Translator.load(small_config.run_dir)


@pytest.mark.parametrize("beam_size", [1, 3])
@pytest.mark.parametrize("no_repeat_ngram", [0, 2])
def test_a_search_waits_once_every_few_steps(gpu_translator, beam_size, no_repeat_ngram, monkeypatch):
    gpu, translator = gpu_translator
    step, steps = CachedDecoder.step, count()
    monkeypatch.setattr(CachedDecoder, "step", lambda *arguments: (next(steps), step(*arguments))[1])
    gpu.waits.clear()
    translator.translate(["I can eat an apple."] * 12, beam_size, no_repeat_ngram=no_repeat_ngram)
    made = next(steps)
    assert made > CHECK_EVERY
    assert len(gpu.waits) <= made / CHECK_EVERY + PER_SEARCH


@pytest.mark.slow
def test_recording_and_experiments_find_the_same_as_on_a_cpu(gpu_translator, small_config):
    gpu, on_gpu = gpu_translator
    on_cpu, sentence = Translator.load(small_config.run_dir, "cpu"), "I can eat an apple."
    gpu.waits.clear()
    traces = [record_trace(translator, sentence, target="mangio una mela") for translator in (on_gpu, on_cpu)]
    for kind, weights in traces[0].weights.items():
        assert weights == pytest.approx(traces[1].weights[kind], abs=1e-5)
    tables = [step_table(translator, sentence) for translator in (on_gpu, on_cpu)]
    assert tables[0].probability.tolist() == pytest.approx(tables[1].probability.tolist(), abs=1e-5)
    tables = [compare(translator, sentence) for translator in (on_gpu, on_cpu)]
    assert tables[0].change.tolist() == pytest.approx(tables[1].change.tolist(), abs=1e-4)
    head_importance(on_gpu, [sentence], ["mangio una mela"])
    pattern = partial(fixed_pattern, weights=torch.from_numpy(traces[0].weights["cross"][0, 0]))
    with intervene(on_gpu.model, pattern, "cross", heads=[0]):
        on_gpu.translate([sentence])
    rows, gradients = [], []
    for translator in (on_gpu, on_cpu):
        scene = translate_scene(translator, sentence)
        rows.append(inside_head(translator, scene, sentence, "cross", layer=0, head=0, row=1)["contribution"].tolist())
        gradients.append(gradient_times_input(translator, scene, sentence, step=1)[0].tolist())
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)
    assert gradients[0] == pytest.approx(gradients[1], abs=1e-5)
    assert not [wait for wait in gpu.waits if "index on the CPU" in wait]


def test_training_on_the_simulated_gpu_ends_with_the_weights_of_the_cpu(small_config, tmp_path):
    config = replace(small_config, dropout=0.0, precision="fp32", validation_sentences=0)
    on_cpu = train_model(replace(config, run_dir=str(tmp_path / "cpu"), device="cpu")).model.state_dict()
    with SimulatedCuda():
        on_gpu = train_model(config).model.state_dict()
    for name, weights in on_cpu.items():
        assert torch.allclose(on_gpu[name].values, weights, atol=1e-4), name


def test_a_run_of_an_apple_gpu_resumes_on_cuda(small_config, monkeypatch):
    """Without a fused optimizer, Adam's step counters are on the CPU; CUDA's fused kernel needs them on the GPU."""
    monkeypatch.setattr("training.state.make_optimizer", lambda *args: make_optimizer(*args[:2], torch.device("mps")))
    config = replace(small_config, num_epochs=1, validation_sentences=0)
    train_model(replace(config, device="cpu"))
    assert not load_checkpoint(checkpoints(config)[-1])["optimizer"]["param_groups"][0]["fused"]
    monkeypatch.undo()
    with SimulatedCuda():
        assert train_model(replace(config, num_epochs=2)).progress.epoch == 2


def test_training_lets_a_gpu_use_its_fast_kernels(small_config, monkeypatch):
    """The flash kernel takes no mask, so decoder self-attention needs the causal flag instead; fp32 may use TF32."""
    calls, attention = [], torch.nn.functional.scaled_dot_product_attention

    def observed(query, key, value, mask, dropout, is_causal):
        calls.append((mask is None, is_causal))
        return attention(query, key, value, mask, dropout, is_causal)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", observed)
    with SimulatedCuda() as gpu:
        train_model(replace(small_config, max_steps=1, validation_sentences=0))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert calls[:3] == [(False, False), (True, True), (False, False)]  # encoder, decoder, cross
    assert gpu.matmul_precision == "high"
    assert torch.get_float32_matmul_precision() == "highest"


def test_auto_precision_follows_the_compute_capability():
    for capability, precision in (((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((6, 1), "fp32")):
        with SimulatedCuda(capability):
            assert choose_precision("auto", get_device(), torch.nn.Linear(2, 2)) == precision


# ---------------------------------------------------------------------------- the simulated device itself


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "assignment by a boolean index": lambda x: x.__setitem__(x >= 0, torch.ones_like(x)),
    "index on the CPU": lambda x: x[[0, 1]],
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "blocking upload": lambda x: torch.ones(3).pin_memory().to("cuda"),
    "pageable upload": lambda x: torch.ones(3).to("cuda", non_blocking=True),
    "tensor from a list": lambda x: torch.tensor([1, 2], device="cuda"),
    "copy from the CPU": lambda x: x.copy_(torch.zeros(3)),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", WAITS)
def test_the_simulated_gpu_notices_a_wait(name, inference):
    with SimulatedCuda() as gpu, torch.inference_mode(inference):
        x = torch.arange(3.0, device="cuda")
        assert gpu.waits == []
        WAITS[name](x)
        assert len(gpu.waits) == 1
        assert gpu.waits[0].startswith("test_cuda.py:")


def test_the_simulated_gpu_refuses_tensors_of_the_cpu():
    with SimulatedCuda() as gpu:
        x = torch.ones(2, 2, device="cuda")
        for mixed in (
            lambda: x + torch.ones(2, 2),
            lambda: torch.cat([x, torch.ones(2, 2)]),
            lambda: torch.nn.Linear(2, 2)(x),
            lambda: torch.ones(3, 2)[torch.zeros(1, dtype=torch.long, device="cuda")],
            lambda: torch.tensor(1.0).add_(x.sum()),
            lambda: torch._foreach_add([x], [torch.tensor(1.0)]),
            lambda: torch.ones(2, 2).scatter(0, torch.zeros(2, 2, dtype=torch.long, device="cuda"), 1.0),
        ):
            with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
                mixed()
        assert (x * torch.tensor(2.0)).sum().device.type == "cuda"  # a scalar may be on the CPU
        torch.ones(2).pin_memory().to("cuda", non_blocking=True)
    assert gpu.waits == []
