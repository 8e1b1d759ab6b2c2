"""The validated form of a recipe: one pydantic model per section.

A section checks what can be said of itself; what concerns several sections is in ``Config``. What a
plugin requires is checked where plugins are resolved (plugins.py). Sizes are of the whole model and
of the whole job, never of one rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_serializer,
    model_validator,
)

VOCAB_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, as in the paper, whatever the parallel layout."""

MIN_TRAINED_VOCAB = 300
"""Tokens of the smallest tokenizer that is trained: 256 bytes, four special ones, and some characters."""
MAX_NAME = 200
"""Characters of a name or label, each of which becomes a folder's."""
RESERVED_LABELS = {
    *("checkpoints", "log.txt", "manifest.json", "measure", "metrics.jsonl", "recipe.yaml", "stopped.json"),
    *("summary.json", "tensorboard", "wandb", "wandb_run_id"),
}
"""What sinkbench itself may write where a sweep's runs have their folders."""


def _in_a_home(path: str) -> str:
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder for {Path(path).parts[0]}; write the path out") from None
    return path


def _not_reserved(label: str) -> str:
    if label.lower() in RESERVED_LABELS:
        raise ValueError(f"{label} is the name of a file or folder of a run; choose another label")
    return label


# Far above what any machine can hold, and below what integers of tensors, seeds and files can.
Layers = Annotated[int, Field(gt=0, le=10_000)]
Width = Annotated[int, Field(gt=0, le=2**20)]
Length = Annotated[int, Field(gt=0, le=2**26)]
Vocabulary = Annotated[int, Field(gt=0, le=2**30)]
Sequences = Annotated[int, Field(gt=0, le=2**24)]
Processes = Annotated[int, Field(gt=0, le=2**20)]
Steps = Annotated[int, Field(gt=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
FolderPath = Annotated[str, Field(min_length=1), AfterValidator(_in_a_home)]
"""A path, in which ~ is the user's home."""


MEGATRON_FIELDS = frozenset(
    {
        "cross_entropy_fusion_impl",
        "cross_entropy_loss_fusion",
        "defer_embedding_wgrad_compute",
        "distribute_saved_activations",
        "hidden_dropout",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "recompute_method",
        "recompute_num_layers",
        "tp_comm_overlap",
        "wgrad_deferral_limit",
    }
)
"""Fields of megatron's TransformerConfig that take effect here and that no section of the recipe owns."""


Fusion = Literal["loss", "layer", "gradients", "optimizer", "communication"]
FUSIONS: tuple[Fusion, ...] = ("loss", "layer", "gradients", "optimizer", "communication")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class PluginRef(Section):
    """A plugin by name with its parameters: ``name`` or ``{name: ..., parameter: value}``.
    Parameters are validated by the plugin itself when it is resolved."""

    name: str = Field(min_length=1)
    params: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "params" not in value:
            named = {"name": value["name"]} if "name" in value else {}
            return named | {"params": {k: v for k, v in value.items() if k != "name"}}
        return value

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {"name": self.name} | self.params


class ModelConfig(Section):
    num_layers: Layers
    hidden_size: Width
    num_attention_heads: Width
    num_query_groups: Width | None = None
    """kv heads; default: as many as attention heads."""
    head_size: Width | None = None
    """default: hidden_size / num_attention_heads."""
    ffn: Literal["swiglu", "geglu", "reglu", "swish", "gelu", "gelu_tanh", "relu", "none"] = "swiglu"
    ffn_hidden_size: Width | None = None
    """width of the feed-forward block; needed unless ffn is none, with which it has no effect."""
    linear_bias: Literal["none", "qkv", "all"] = "none"
    """bias of the linear maps within layers: none, of queries, keys and values (Qwen2), or of all (GPT-2)."""
    parallel_residual: bool = False
    """attention and feed-forward block read the same stream: x + attn(norm(x)) + ffn(norm(x)) (GPT-NeoX)."""
    seq_length: Length
    vocab_size: Vocabulary | None = None
    """before padding to a multiple of 64; default: that of the data."""
    attention: PluginRef = PluginRef(name="softmax")
    normalization: PluginRef = PluginRef(name="rmsnorm")
    positional: PluginRef = PluginRef(name="rope")
    init: Literal["paper", "normal"] = "paper"
    init_std: PositiveFloat = 0.02
    """standard deviation when init is normal."""
    tie_embeddings: bool = False
    backend: Literal["auto", "eager", "flash", "flex", "linear", "sdpa", "te", "triton"] = "auto"
    """attention implementation; auto takes the fastest that can do the job. te is Transformer Engine's, of
    linears and norms too unless these say otherwise."""
    linears: Literal["local", "te"] | None = None
    """linear maps within the layers: of megatron-core, or of Transformer Engine; default: te with backend te,
    otherwise local."""
    norms: Literal["local", "te", "apex"] | None = None
    """norms: the plugin's own modules, or RMSNorm and LayerNorm of Transformer Engine or Apex. Default:
    te with backend te, where it has the plugin's norm, otherwise local."""
    megatron: dict[str, Any] = {}
    """further fields of megatron's TransformerConfig, checked."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.head_size is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}; change one of them or set head_size"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.kv_heads}; change one of them"
            )
        if self.ffn != "none" and self.ffn_hidden_size is None:
            raise ValueError(f"ffn_hidden_size is missing for ffn {self.ffn}; set it, or ffn: none")
        if self.parallel_residual and self.ffn == "none":
            raise ValueError("parallel_residual: true needs a feed-forward block; set ffn, or write false")
        # A recipe that was written out has every default.
        default = type(self).model_fields["init_std"].default
        if self.init == "paper" and self.init_std != default:
            raise ValueError(
                f"init_std has no effect with init: paper; set init to normal, or init_std to {default}"
            )
        return self

    @property
    def linear_maps(self) -> Literal["local", "te"]:
        """Whose linear maps the layers have."""
        return self.linears or ("te" if self.backend == "te" else "local")

    def portable(self) -> ModelConfig:
        """The same model on any host, whatever packages the recipe asks for."""
        return self.model_copy(update={"backend": "auto", "linears": "local", "norms": "local"})

    @property
    def kv_heads(self) -> int:
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_attention_heads


class BigramBackcopyConfig(Section):
    """The Bigram-Backcopy task (Guo et al. 2410.13835), drawn afresh, deterministic by seed."""

    source: Literal["bigram_backcopy"]
    vocab_size: Annotated[int, Field(ge=8, le=4096)] = 65
    """<s> is token 0; the others have a Dirichlet bigram table."""
    num_triggers: PositiveInt = 3
    """the most frequent tokens; after one of them the token before it is repeated."""
    concentration: PositiveFloat = 1.0
    """of the Dirichlet prior of each bigram row."""
    seed: Seed = 0
    """of the table; the sequences follow the recipe's seed."""
    transforms: list[PluginRef] = []

    @model_validator(mode="after")
    def _check(self) -> BigramBackcopyConfig:
        if self.num_triggers > self.vocab_size - 2:
            raise ValueError(
                f"num_triggers {self.num_triggers} leaves no other token of vocab_size {self.vocab_size}; "
                "lower it"
            )
        return self


class BlendEntry(Section):
    path: FolderPath
    """folder written by ``sinkbench data prepare``, or a folder of such folders: they are blended by their
    sizes, as if shuffled together."""
    weight: PositiveFloat = 1.0
    """share of the sequences relative to the other entries': without weights all count equally, whatever
    their sizes."""


class TokenizerConfig(Section):
    """Which tokenizer to use, or to train, when data is prepared."""

    path: FolderPath | None = None
    """a SentencePiece .model, a tokenizer.json, a folder of a Hugging Face tokenizer, or OWNER/NAME on the
    Hugging Face hub."""
    train_vocab_size: Annotated[int, Field(ge=MIN_TRAINED_VOCAB, le=2**24)] | None = None
    """train a SentencePiece BPE model with byte fallback of this size on the inputs."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerConfig:
        if (self.path is None) == (self.train_vocab_size is None):
            raise ValueError("give exactly one of path and train_vocab_size")
        return self


class PrepareConfig(Section):
    """Inputs that the trainer prepares on first use into a cache folder."""

    inputs: list[FolderPath] = Field(min_length=1)
    """files, folders, or ``python:docs``, ``python:help`` (docs as dialogues), ``python:stdlib`` of the
    running Python."""
    tokenizer: TokenizerConfig
    text_field: str = Field(default="text", min_length=1)
    """of JSON objects and of parquet files."""
    cache: FolderPath = "~/.cache/sinkbench"
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """share of documents kept for validation."""


class IndexedConfig(Section):
    """Token files made by ``sinkbench data prepare`` (megatron IndexedDataset)."""

    source: Literal["indexed"]
    train: list[BlendEntry] = []
    validation: dict[str, FolderPath] = {}
    """domain -> prepared folder; default: the held-out split of each train entry."""
    prepare: PrepareConfig | None = None
    """instead of train: what to prepare on first use."""
    unique_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the training sequences of each folder that is used, repeated as often as the steps need."""
    document_mask: bool = False
    """tokens see those of their own document only, where a sequence holds parts of several."""
    transforms: list[PluginRef] = []

    @field_validator("validation", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("train", mode="before")
    @classmethod
    def _one_path(cls, value: Any) -> Any:
        if value is None:
            return []
        if isinstance(value, str):
            return [{"path": value}]
        if isinstance(value, list):
            return [{"path": v} if isinstance(v, str) else v for v in value]
        return value

    @model_validator(mode="after")
    def _check(self) -> IndexedConfig:
        if bool(self.train) == (self.prepare is not None):
            raise ValueError("give exactly one of train and prepare")
        return self


DataConfig = Annotated[BigramBackcopyConfig | IndexedConfig, Field(discriminator="source")]


class OptimConfig(Section):
    """AdamW and its schedule. Learning-rate changes are per step."""

    lr: PositiveFloat
    min_lr: NonNegativeFloat | None = None
    """end of the schedule; default: lr for constant, lr/10 for the others."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    warmup_steps: NonNegativeInt = 100
    decay_steps: PositiveInt | None = None
    """of wsd: the steps at the end that decay; default: a tenth of the steps."""
    weight_decay: NonNegativeFloat = 0.1
    weight_decay_on: Literal["all", "matrices"] = "all"
    """the paper decays every parameter; matrices leaves out those with one dimension."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = 1.0
    """global gradient norm; 0 turns it off."""
    implementation: Literal["torch", "te", "apex"] = "torch"
    """whose kernels update: torch's, or those of FusedAdam in Transformer Engine or NVIDIA Apex."""

    @field_validator("betas")
    @classmethod
    def _betas(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= b < 1 for b in value):
            raise ValueError("betas must lie in [0, 1)")
        return value

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.end_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}; lower it")
        if self.schedule == "constant" and self.min_lr not in (None, self.lr):
            raise ValueError(
                "min_lr has no effect with schedule: constant; set schedule to cosine or wsd, or min_lr to "
                "null"
            )
        if self.schedule != "wsd" and self.decay_steps is not None:
            raise ValueError(
                f"decay_steps has no effect with schedule: {self.schedule}; set schedule to wsd, or "
                "decay_steps to null"
            )
        return self

    @property
    def end_lr(self) -> float:
        if self.schedule == "constant":
            return self.lr
        return self.lr / 10 if self.min_lr is None else self.min_lr

    def wsd_decay_steps(self, steps: int) -> int:
        """Those that decay at the end of ``steps``, under schedule wsd."""
        return self.decay_steps or max(1, steps // 10)


class TrainConfig(Section):
    steps: Steps
    global_batch_size: Sequences
    """sequences per step."""
    micro_batch_size: Sequences | None = None
    """sequences per forward; default: the largest divisor that has at most 2^15 tokens (2^16 on
    a card that holds neither attention's scores nor all logits), and 2^30 tokens x layers x hidden size."""
    precision: Literal["fp32", "bf16"] = "bf16"
    fp8: Literal["tensorwise", "blockwise"] | None = None
    """products of Transformer Engine's linear maps in 8 bits while training, by scales of each tensor or each
    block as it is then; what is measured and validated is computed without."""
    recompute: Literal["none", "attention", "full"] = "none"
    """activations computed again in the backward pass."""
    max_minutes: PositiveFloat | None = None
    """wall-clock time after which the run stops cleanly, launcher and start included; default: none, or the
    end of the SLURM job."""
    max_skipped_steps: NonNegativeInt = 3
    """steps running whose loss or gradient is not finite that are passed over without an update."""
    on_spike: Literal["log", "skip", "stop"] = "log"
    """what to do about a loss above the running mean by spike_sigmas deviations."""
    spike_sigmas: PositiveFloat = 6.0
    fused: Literal["auto"] | list[Fusion] = "auto"
    """parts that run in fewer kernels and less memory, with the same results: the loss; a layer's norms,
    activations and rotation; the sum of the weights' gradients over micro-batches; the optimizer's update;
    sequence parallelism's communication, beside products of linear maps (local ones). auto: all of them on
    CUDA, none on a CPU."""
    cuda_graph: Literal["auto"] | bool = "auto"
    """replay a step's forward and backward pass instead of launching its kernels from Python, which then runs
    no part of the model after the first steps. auto: without recompute, on one card or
    cards that are one tensor-parallel group."""
    deterministic: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is a card."""


class ParallelConfig(Section):
    """Sizes of the parallel groups; data parallel is what remains of the processes."""

    tensor: Processes = 1
    pipeline: Processes = 1
    virtual_pipeline: Processes = 1
    """model chunks per pipeline rank (interleaved schedule)."""
    context: Processes = 1
    sequence: bool = False
    """sequence parallel: shard activations between tensor-parallel regions."""
    overlap: bool = True
    """overlap gradient reduction with the backward pass."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence: true needs tensor > 1; set tensor, or sequence: false")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline > 1 needs pipeline > 1; set pipeline")
        return self

    @property
    def model_size(self) -> int:
        return self.tensor * self.pipeline * self.context


class ValidationConfig(Section):
    every: NonNegativeInt = 0
    """steps between validation losses; 0 turns it off. The last step is always validated then."""
    sequences: Sequences = 64
    """held-out sequences per domain."""


class CheckpointConfig(Section):
    start_from: FolderPath | None = None
    """a checkpoint whose weights a new run starts from, written under any layout."""
    every: NonNegativeInt = 0
    """steps between checkpoints; 0 writes only the last."""
    keep_last: PositiveInt = 2
    keep_every: NonNegativeInt = 0
    """also keep every checkpoint whose step this divides; 0: none."""
    asynchronous: bool = Field(default=True, alias="async")
    """go on training while a checkpoint is written, from a copy in host memory."""
    verify: Literal["full", "size"] = "full"
    """what is compared before a checkpoint is loaded: checksums of all files, or their sizes only."""
    allow_change: list[str] = []
    """keys or sections in which the recipe may differ from that of the run it goes on with."""


class MeasureConfig(Section):
    """The sink probe during training (paper: eps 0.3, 64 tokens, 100 sequences, no BOS)."""

    every: NonNegativeInt = 500
    """steps between probes; 0 turns them off. First and last step are probed then."""
    count: Sequences = 100
    length: Length = 64
    eps: PositiveFloat = 0.3
    metrics: list[PluginRef] = [PluginRef(name="sink"), PluginRef(name="norms")]


class LogConfig(Section):
    every: PositiveInt = 10
    """steps between lines of metrics.jsonl."""
    progress: bool = True
    tensorboard: bool = False
    wandb: WandbConfig | None = None


class WandbConfig(Section):
    project: str = "sinkbench"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    """auto is offline without a key."""


class Config(Section):
    name: str = Field(min_length=1, max_length=MAX_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """of the run; its folder is output_dir/name."""
    output_dir: FolderPath = "runs"
    """where runs have their folders."""
    seed: Seed = 1234
    """of initial weights, and of the order of the data."""
    label: (
        Annotated[
            str,
            Field(max_length=MAX_NAME, pattern=r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$"),
            AfterValidator(_not_reserved),
        ]
        | None
    ) = None
    """of a run within a sweep; names its folder."""
    model: ModelConfig
    loss: PluginRef = PluginRef(name="causal_lm")
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    measure: MeasureConfig = MeasureConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        m, p = self.model, self.parallel
        for what, size in (
            ("num_attention_heads", m.num_attention_heads),
            ("num_query_groups", m.kv_heads),
            ("ffn_hidden_size", m.ffn_hidden_size if m.ffn != "none" else None),
        ):
            if size is not None and size % p.tensor:
                raise ValueError(
                    f"model.{what} {size} is not divisible by parallel.tensor {p.tensor}; change one of them"
                )
        stages = p.pipeline * p.virtual_pipeline
        if m.num_layers % stages:
            raise ValueError(
                f"model.num_layers {m.num_layers} is not divisible by parallel.pipeline x "
                f"virtual_pipeline = {stages}; change one of them"
            )
        chunks = (2 * p.context if p.context > 1 else 1) * (p.tensor if p.sequence else 1)
        probed = self.measure.length if self.measure.every else chunks
        for what, length in (("model.seq_length", m.seq_length), ("measure.length", probed)):
            if length % chunks:
                raise ValueError(
                    f"{what} {length} is not divisible by {chunks}, which "
                    "parallel.context and parallel.sequence need; change one of them"
                )
        if self.measure.every and self.measure.length > m.seq_length:
            raise ValueError(
                f"measure.length {self.measure.length} is above model.seq_length {m.seq_length}; lower it"
            )
        if self.train.fp8 is not None:
            self._check_fp8(16 if self.train.fp8 == "tensorwise" else 128)
        if self.optim.warmup_steps > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} is above train.steps "
                f"{self.train.steps}; lower it"
            )
        decay = self.optim.wsd_decay_steps(self.train.steps) if self.optim.schedule == "wsd" else 0
        if self.optim.warmup_steps + decay > self.train.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} and optim.decay_steps {decay} are together "
                f"above train.steps {self.train.steps}; lower one of them"
            )
        return self

    def _check_fp8(self, multiple: int) -> None:
        """
        Args:
            multiple: of the sizes of matrices that the products take.
        """
        m, p = self.model, self.parallel
        if m.linear_maps != "te" or self.train.precision != "bf16":
            raise ValueError(
                "train.fp8 is for Transformer Engine's linear maps in bf16; set model.linears: te and "
                "train.precision: bf16, or remove it"
            )
        for what, size in (
            ("model.hidden_size", m.hidden_size),
            ("head_size x kv heads", m.head_dim * m.kv_heads // p.tensor),
            ("model.ffn_hidden_size", (m.ffn_hidden_size or 0) // p.tensor),
            ("model.seq_length", m.seq_length // (p.context * (p.tensor if p.sequence else 1))),
        ):
            if size % multiple:
                raise ValueError(
                    f"train.fp8: {self.train.fp8} needs multiples of {multiple} on each rank, and {what} is "
                    f"{size} there; change one of them"
                )


def has_document_mask(config: Config) -> bool:
    """Whether tokens see those of their own document only."""
    return isinstance(config.data, IndexedConfig) and config.data.document_mask


def padded_vocab_size(vocab_size: int) -> int:
    """The vocabulary size of the model's tables: the next multiple of 64."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
