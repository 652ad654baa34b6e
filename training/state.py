"""The training state: weights, their moving average, optimizer, progress and random number generators."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from compute import distributed, sharding
from compute.device import LossScaler, choose_precision
from config import Config, InputError
from model import Transformer, get_model
from translate import load_state_dict

# Settings of the optimizer that follow the present config and device rather than the checkpoint. `fused` must be known
# before loading: the fused kernel keeps its step counters on the device.
OWN_SETTINGS = ("weight_decay", "betas", "fused")


@dataclass
class Progress:
    """The progress of a run: the epoch and batch to train next, and the number of completed optimizer steps."""

    epoch: int = 0
    batch: int = 0
    step: int = 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} is {value!r}")


@dataclass
class TrainingState:
    """Everything that changes during training. `state_dict` and `load_state_dict` save and restore it exactly."""

    model: Transformer
    ema_model: Transformer | None
    optimizer: torch.optim.AdamW
    scaler: LossScaler
    progress: Progress = field(default_factory=Progress)
    stop_signal: int = 0  # the signal that ended training; 0: none; not saved
    whole_model: Transformer | None = None  # with --shard, in the first process: receives the weights for validation

    @classmethod
    def create(cls, config: Config, src_vocab_size: int, tgt_vocab_size: int, device: torch.device) -> "TrainingState":
        """A new state, seeded by the config: the same weights in every process, but different dropout."""
        torch.manual_seed(config.seed)
        model = get_model(config, src_vocab_size, tgt_vocab_size)
        if not distributed.is_first():
            torch.manual_seed(config.seed + distributed.rank())
        ema_model = copy.deepcopy(model).requires_grad_(False).eval() if config.ema_decay else None
        is_sharded = sharding.is_wanted(config)
        whole_model = copy.deepcopy(model) if is_sharded and distributed.is_first() else None
        for each in filter(None, (model, ema_model)):
            if is_sharded:
                sharding.shard(each, [*each.encoder.layers, *each.decoder.layers], "hidden", device)
            else:
                each.to(device)
        scaler = LossScaler(device, choose_precision(config.precision, device, model))
        return cls(model, ema_model, make_optimizer(model, config, device), scaler, whole_model=whole_model)

    @property
    def is_sharded(self) -> bool:
        """Whether each process has a part of the weights only (`--shard`)."""
        return sharding.is_sharded(next(self.model.parameters()))

    @property
    def evaluated_model(self) -> Transformer:
        """The model that is used for validation and translation: the EMA if there is one.

        With --shard, its copy in the first process, which has the present weights within `gathering`.
        """
        return self.whole_model or self.ema_model or self.model

    @contextlib.contextmanager
    def gathering(self) -> Iterator[None]:
        """Context in which `evaluated_model` has the present weights, on the device. All processes must enter it."""
        if self.is_sharded:
            weights = sharding.weights_in_first_process(self.ema_model or self.model)
            if self.whole_model:
                load_state_dict(self.whole_model, weights)
                self.whole_model.to(self.device)
        yield
        if self.whole_model:
            self.whole_model.cpu()  # frees the device's memory for training

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Moves the EMA toward the trained weights (Polyak and Juditsky, 1992).

        It averages over about 1 / (1 - decay) steps; at the start, over about a ninth of the steps made so far.
        """
        decay = min(decay, (1 + self.progress.step) / (10 + self.progress.step))
        torch._foreach_lerp_(list(self.ema_model.parameters()), list(self.model.parameters()), 1 - decay)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Replaces the weights and their EMA, at the start of a run."""
        for model in filter(None, (self.model, self.ema_model)):
            load_into(model, weights)

    def state_dict(self) -> dict:
        """The state as plain values and tensors. All processes must call it, because it gathers their generators.

        With --shard, it also gathers the tensors, which only the first process has then.
        """
        weights = sharding.weights_in_first_process if self.is_sharded else nn.Module.state_dict
        return {
            "model": weights(self.model),
            "ema_model": weights(self.ema_model) if self.ema_model else None,
            "optimizer": sharding.in_first_process(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "rng": distributed.gather(rng_state()),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restores a saved state. Optimizer settings, such as weight decay, remain those of the current config.

        Raises InputError if the state of the optimizer does not fit the model.
        """
        load_into(self.model, state["model"])
        if self.ema_model:
            load_into(self.ema_model, state["ema_model"])
        own = [{name: group[name] for name in OWN_SETTINGS} for group in self.optimizer.param_groups]
        saved = state["optimizer"]
        check_moments(saved["state"], self.optimizer)
        groups = [{**group, **settings} for group, settings in zip(saved["param_groups"], own, strict=True)]
        moments = divided_moments(saved["state"], self.optimizer)
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.scaler.load_state_dict(state.get("scaler", {}))  # added later than the other parts
        self.progress = Progress(**state["progress"])
        if len(state["rng"]) == distributed.world_size():  # otherwise the dropout masks will differ
            set_rng_state(state["rng"][distributed.rank()])


def make_optimizer(model: nn.Module, config: Config, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay applies to matrices only, not to biases and LayerNorms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.adam_beta2), eps=1e-9, fused=device.type != "mps")


def load_into(model: Transformer, weights: dict[str, Tensor]) -> None:
    """Loads the weights of a whole model; if `model` is sharded, this process's part of them."""
    own = model.state_dict()
    load_state_dict(model, {name: sharding.divided_like(w, own.get(name)) for name, w in weights.items()})


def divided_moments(saved: dict[int, dict], optimizer: torch.optim.AdamW) -> dict[int, dict]:
    """The saved moments; of sharded parameters, this process's part of them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        i: {name: t if name == "step" else sharding.divided_like(t, parameters[i]) for name, t in moments.items()}
        for i, moments in saved.items()
    }


def check_moments(saved: dict[int, dict], optimizer: torch.optim.AdamW) -> None:
    """Raises InputError if saved moments have other shapes than they should: PyTorch would read beyond them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved.items():
        shape = tuple(parameters[index].shape)
        for name, expected in (("exp_avg", shape), ("exp_avg_sq", shape), ("step", ())):
            if tuple(moments[name].shape) != expected or not moments[name].is_floating_point():
                found = f"shape {tuple(moments[name].shape)} ({moments[name].dtype})"
                raise InputError(
                    f"the checkpoint has an optimizer state of {found} for weights of shape {shape}; "
                    "restore the file, or resume from another epoch with --preload"
                )


def rng_state() -> dict:
    """The states of the random number generators that dropout uses."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_rng_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    if torch.backends.mps.is_available() and state["mps"] is not None:
        torch.mps.set_rng_state(state["mps"])
