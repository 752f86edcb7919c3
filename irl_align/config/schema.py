"""The recipe: one tree of options, each documented once, beside its field.

Reading a recipe from YAML, overrides and error messages are in :mod:`irl_align.config.recipe`.
Options of TRL's trainers are passed through under TRL's own names in the ``args`` fields. Those of
the policy updates are in :mod:`irl_align.config.policy_update`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from irl_align.config.lora import LoraOptions, QuantizationOptions, lora_problem
from irl_align.config.policy_update import BestOfNOptions, PolicyPromptOptions, PolicyUpdateOptions
from irl_align.config.types import (
    Above,
    AtLeast,
    Count,
    ImportPath,
    Options,
    PathText,
    Positive,
    Share,
)

PairSource = Literal[
    "demonstration/policy", "demonstration/contrast", "demonstration/init", "sft/init"
]

# What decides the meaning of samples, or has an option of its own in the recipe.
ENGINE_OPTIONS_SET_HERE = {
    "dtype",
    "enable_lora",
    "generation_config",
    "logprobs_mode",
    "max_model_len",
    "model",
    "seed",
    "skip_tokenizer_init",
    "trust_remote_code",
    "worker_extension_cls",
}


class DataOptions(Options):
    """Demonstrations: where they come from and how they are divided."""

    card: PathText
    """Name of a card in data_cards/, or the path of a card of your own."""
    path: PathText | None = None
    """Local file or folder in place of the card's source."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the card's task when the card names a procedural task (size, noise)."""
    edit: ImportPath | None = None
    """module:callable, an edit of a prompt in place of the card's, for pairs and edited prompts."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the training prompts that are used, chosen by a hash of the prompt."""
    noise: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the training demonstrations, held-out ones too, whose completion is replaced by
    another prompt's, chosen by the seed: for ablations."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Share of the training prompts that neither SFT nor the reward sees: for selection."""
    reward_data: Literal["same", "disjoint"] = "same"
    """Whether the reward is fitted on SFT's own demonstrations or on others (by prompt)."""
    reward_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """With reward_data=disjoint: share of the prompts that go to the reward."""
    max_prompt_tokens: Positive = 512
    """Longest prompt, in tokens, template included."""
    max_completion_tokens: Positive = 512
    """Longest demonstration, in tokens, EOS included."""
    overlong: Literal["error", "drop"] = "error"
    """A row longer than the limits stops the run, or is dropped and counted."""

    @model_validator(mode="after")
    def _share_is_used(self) -> DataOptions:
        if self.reward_data == "same" and self.reward_share != 0.5:
            raise ValueError("reward_share is an option of reward_data disjoint, not of same")
        return self


class ScratchOptions(Options):
    """A small model from random weights, its tokenizer trained on the demonstrations."""

    architecture: Literal["llama", "gpt_neox"] = "llama"
    """Transformer family."""
    vocab_size: Positive = 1200
    """Size of the byte-level BPE vocabulary, special tokens included."""
    hidden_size: Positive = 192
    """Width H."""
    intermediate_size: Positive = 512
    """Width of the feed-forward layers."""
    num_hidden_layers: Positive = 4
    """Depth."""
    num_attention_heads: Positive = 6
    """Attention heads; divides hidden_size."""
    num_key_value_heads: Positive | None = None
    """Key-value heads (llama only); null means as many as attention heads."""
    max_position_embeddings: Positive = 512
    """Context length in tokens."""
    tie_word_embeddings: bool = True
    """Whether input and output embeddings are one matrix."""

    @model_validator(mode="after")
    def _heads_fit(self) -> ScratchOptions:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_key_value_heads is not None:
            if self.architecture != "llama":
                raise ValueError("num_key_value_heads is for architecture llama only")
            if self.num_attention_heads % self.num_key_value_heads:
                raise ValueError(
                    f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                    f"num_key_value_heads {self.num_key_value_heads}"
                )
        return self


class ModelOptions(Options):
    """The policy's start: an existing model, or a small one from scratch."""

    path: PathText | None = None
    """Hub id or folder of a causal language model with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    from_scratch: ScratchOptions | None = None
    """Make a small model instead of loading one."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave it off unless you have read that code."""
    chat_template: str | None = None
    """Jinja file with a chat template, for a tokenizer that has none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the stored weights."""
    lora: LoraOptions | None = None
    """Train adapters in place of all weights, wherever a policy is trained."""
    quantization: QuantizationOptions | None = None
    """QLoRA: the weights below the adapters are held in 4 bits, by bitsandbytes."""

    @model_validator(mode="after")
    def _one_start(self) -> ModelOptions:
        if (self.path is None) == (self.from_scratch is None):
            raise ValueError("give exactly one of path and from_scratch")
        for name in ("revision", "trust_remote_code", "chat_template"):
            if self.path is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is an option of path, not of from_scratch")
        return self


class SFTOptions(Options):
    """Supervised fine-tuning on the demonstrations: gives policy pi_0."""

    enabled: bool = True
    """False: the model given is taken as pi_0 as it is."""
    full: bool = False
    """With model.lora: SFT trains all weights all the same, and the adapters are those of pi_0."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.SFTConfig."""

    @model_validator(mode="after")
    def _full_is_read(self) -> SFTOptions:
        if self.full and not self.enabled:
            raise ValueError("full is of an SFT, and enabled is false")
        return self


class ServerOptions(Options):
    """vLLM servers, of backend vllm-server."""

    urls: list[str] = Field(default_factory=list)
    """Servers that are there (irl-align vllm-serve), which see this machine's files under the same
    paths; empty starts one here."""
    port: Annotated[int, Field(gt=0, lt=65536)] | None = None
    """Port of the server that is started, on the loopback; null is a free one."""
    api_key_env: str = "VLLM_API_KEY"
    """Environment variable that holds the servers' API key."""
    timeout: Above = 600.0
    """Seconds for one request, or for loading weights."""
    start_timeout: Above = 600.0
    """Seconds for a server to start."""
    retries: Positive = 4
    """How often a request, or a server that fails, is tried again, with growing pauses."""

    @model_validator(mode="after")
    def _port_is_used(self) -> ServerOptions:
        if self.urls and self.port is not None:
            raise ValueError("port is of the server that is started: urls are given, so none is")
        return self


class GenerationOptions(Options):
    """How the policy is sampled for pairs, Best-of-N and evaluation."""

    backend: Literal["transformers", "vllm", "vllm-server", "auto"] = "transformers"
    """What samples: transformers, vllm in this process, vllm-server; auto is vllm where there is a
    GPU and vLLM is installed. Each draws its own random numbers."""
    engine: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own options under its own names, e.g. {tensor_parallel_size: 2}."""
    server: ServerOptions = ServerOptions()
    """vLLM servers."""
    temperature: AtLeast = 1.0
    """Temperature of the negatives; 0 is greedy, and warned of."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling for the negatives; 1 is off."""
    top_k: Count = 0
    """Top-k sampling for the negatives; 0 is off."""
    max_new_tokens: Positive = 128
    """Longest sample, in tokens, EOS included."""
    samples_per_prompt: Positive = 1
    """Policy samples per prompt for the pairs."""
    max_batch_tokens: Positive = 16384
    """Cache positions (prompt and sample, all rows) in one batch."""

    @model_validator(mode="after")
    def _options_are_used(self) -> GenerationOptions:
        if self.backend != "vllm-server" and self.server != ServerOptions():
            raise ValueError(f"server is an option of backend vllm-server, not of {self.backend}")
        if self.engine and (self.backend == "transformers" or self.server.urls):
            raise ValueError("engine is for a vLLM that is started here: there is none")
        ours = sorted(set(self.engine) & ENGINE_OPTIONS_SET_HERE)
        if ours:
            raise ValueError(f"engine.{ours[0]} is set by irl-align: leave it out")
        return self


class PairOptions(Options):
    """What the reward is fitted on: (x, preferred, rejected) made without any preference label."""

    sources: Annotated[list[PairSource], Field(min_length=1)] = Field(
        default_factory=lambda: ["demonstration/policy"]  # type: ignore[arg-type]
    )
    """Preferred/rejected: policy sample, the same text under another prompt (contrast), samples of
    the model before SFT (init)."""
    contrast: Literal["neighbour", "edit"] = "neighbour"
    """Other prompt of a contrast pair: a near neighbour by word overlap, or the task's own edit."""
    contrast_per_demonstration: Positive = 1
    """Contrast pairs per demonstration."""
    contrast_edits: Positive = 1
    """With contrast edit: edits in a row, each prompt preferred to the next for the same text."""
    contrast_crossed: bool = False
    """With contrast edit: edited prompts are preferred as often as rejected, with demonstrations
    that fit the edit, so that a reward cannot learn merely which prompts look edited."""
    window: Annotated[str, Field(pattern=r"^(latest|all|last-[1-9][0-9]*)$")] = "all"
    """Iterations whose pairs are used: latest, last-k or all."""
    truncated: Literal["drop", "keep"] = "drop"
    """Policy samples without EOS: leave their pairs out, or keep them (without EOS)."""
    demonstrations_per_prompt: Positive | None = None
    """At most so many demonstrations of one prompt make pairs; null is all of them."""

    @model_validator(mode="after")
    def _contrast_is_made(self) -> PairOptions:
        doubled = [source for source in self.sources if self.sources.count(source) > 1]
        if doubled:
            raise ValueError(f"sources: {doubled[0]} is there twice")
        for name in (
            "contrast",
            "contrast_per_demonstration",
            "contrast_edits",
            "contrast_crossed",
        ):
            default = type(self).model_fields[name].default
            if "demonstration/contrast" not in self.sources and getattr(self, name) != default:
                raise ValueError(f"{name} is of the source demonstration/contrast: there is none")
        if self.contrast_edits > 1 and self.contrast != "edit":
            raise ValueError(f"contrast_edits is of contrast edit, not of {self.contrast}")
        if self.contrast_crossed and self.contrast != "edit":
            raise ValueError(f"contrast_crossed is of contrast edit, not of {self.contrast}")
        return self


class PreferenceOptions(Options):
    """Human preferences in the reward's loss. Off in everything called IRL."""

    card: PathText
    """Card of a preference set."""
    split: str = "train"
    """Split of the card."""
    path: PathText | None = None
    """Local file or folder in place of the card's source."""
    use: Literal["beside", "alone"] = "beside"
    """Beside the demonstration pairs, or alone: the reward of RLHF, to compare with."""
    weight: Above = 1.0
    """With use=beside: weight of a preference pair against a demonstration pair."""

    @model_validator(mode="after")
    def _weight_is_used(self) -> PreferenceOptions:
        if self.use == "alone" and self.weight != 1.0:
            raise ValueError("weight is an option of use beside, not of alone")
        return self


class RewardOptions(Options):
    """The reward level: fit r_phi on pairs, or SPIN's implicit reward beta log(pi/pi_ref)."""

    kind: Literal["explicit", "implicit", "log_prob", "none"] = "explicit"
    """A reward model, the policy's own log-ratio (SPIN, DPO), or controls in which nothing is
    learned: pi_0's mean log-prob as the reward, or no reward."""
    loss: Literal["bradley_terry", "linear"] = "bradley_terry"
    """Pair loss of the explicit reward: -log sigmoid(r_E - r_hat), or -(r_E - r_hat)."""
    bound: Above | None = None
    """Largest |r|, by bound * tanh(r / bound); the linear loss needs one."""
    init: Literal["cold", "warm"] = "cold"
    """Start of each iteration's fit: the SFT model, or the reward of the iteration before."""
    echo: bool = False
    """Explicit reward: read the prompt again after the completion, and the reward at its end, so
    that every part of the prompt can be checked against the text. No rewards of prefixes: not with
    credit red, abc."""
    lm_coef: AtLeast = 0.0
    """a in r = head + a * (mean log-prob of the completion under the reward's own backbone)."""
    max_pairs: Positive | None = None
    """At most so many pairs of the window are trained on, drawn by the seed; null is all."""
    reference: Literal["previous", "initial", "mixture"] = "previous"
    """Opponent of the implicit reward: pi_k, pi_0, or their geometric mixture."""
    mixture: Share = 0.5
    """With reference=mixture: weight of pi_0; pi_k has the rest."""
    preferences: PreferenceOptions | None = None
    """Human preference pairs to mix in (explicit reward only)."""
    lora: LoraOptions | None = None
    """Train an adapter and the head in place of all weights (explicit reward only)."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Fields of trl.RewardConfig (explicit) or trl.DPOConfig (implicit)."""
    schedule: dict[str, list[Any]] = Field(default_factory=dict)
    """Per-iteration values of fields of args, e.g. beta: [0.1, 0.1, 0.1, 5.0]; the last repeats."""

    @model_validator(mode="after")
    def _consistent(self) -> RewardOptions:
        if self.loss == "linear" and self.bound is None:
            raise ValueError("loss linear is unbounded: give bound, the largest |r|")
        if self.kind != "explicit":
            for name in ("loss", "bound", "echo", "init", "lm_coef", "preferences", "lora"):
                if getattr(self, name) != type(self).model_fields[name].get_default():
                    raise ValueError(f"{name} is an option of kind explicit, not of {self.kind}")
        if self.kind != "implicit":
            for name in ("reference", "mixture"):
                if getattr(self, name) != type(self).model_fields[name].get_default():
                    raise ValueError(f"{name} is an option of kind implicit, not of {self.kind}")
        for name in ("args", "schedule", "max_pairs"):
            if self.kind in ("log_prob", "none") and getattr(self, name):
                fitted = "explicit or implicit"
                raise ValueError(f"{name} is for kind {fitted}: {self.kind} trains nothing")
        if self.reference != "mixture" and self.mixture != 0.5:
            raise ValueError(f"mixture is an option of reference mixture, not of {self.reference}")
        both = sorted(set(self.args) & set(self.schedule))
        if both:
            raise ValueError(f"{both[0]} is both in args and in schedule: give one")
        empty = [name for name, values in self.schedule.items() if not values]
        if empty:
            raise ValueError(f"schedule.{empty[0]} is empty: give one value per iteration")
        return self


class SignOptions(Options):
    """Signs that an iteration went wrong, all seen on demonstrations alone, and what to do."""

    action: Literal["warn", "stop"] = "warn"
    """On a sign after a policy update, or of a reward that forgets: say so, or stop and keep the
    policy before it."""
    unfit_loss: Above = 0.6931471805599453
    """Held-out pair loss at or above this (ln 2): the reward is unfit and is not optimised on. If
    only the pairs with the policy's samples are there, it is told."""
    fresh_accuracy: Share = 0.52
    """Demonstrations against fresh samples at or below this accuracy: nothing left to learn."""
    older_drop: Share = 0.05
    """Fall of the held-out accuracy on earlier iterations' pairs after a refit: forgetting."""
    entropy_low: AtLeast = 0.75
    """Least entropy of the policy, as a multiple of pi_0's."""
    entropy_high: Above = 1.25
    """Largest entropy of the policy, as a multiple of pi_0's."""
    kl: Above = 3.0
    """Largest KL(pi || pi_0) per completion, in nats."""
    length_change: Above = 0.25
    """Largest relative change of the mean completion length against pi_0's."""
    missing_eos: Share = 0.02
    """Largest share of samples without EOS above pi_0's."""
    demonstration_log_prob: Above = 5.0
    """Largest fall of the held-out demonstrations' mean log-prob below pi_0's, in nats."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> SignOptions:
        if self.entropy_low > self.entropy_high:
            raise ValueError(
                f"entropy_low is {self.entropy_low:g}, above entropy_high {self.entropy_high:g}"
            )
        return self


class LoopOptions(Options):
    """The outer loop."""

    iterations: Count = 2
    """Outer iterations; 0 is SFT alone."""
    signs: SignOptions = SignOptions()
    """Bounds that are watched."""
    pick: Literal["last", "nearest"] = "last"
    """Policy of the run: the last, or the one whose samples the last reward tells least from
    held-out demonstrations."""


class EvaluationOptions(Options):
    """What is measured of every policy. Never used for selection."""

    split: Literal["validation", "test"] = "validation"
    """Split of the card whose prompts are answered; tune on validation, report on test."""
    prompts: Positive | None = None
    """Number of distinct prompts, chosen by hash; null is all."""
    temperatures: Annotated[list[AtLeast], Field(min_length=1)] = Field(
        default_factory=lambda: [1.0, 0.0]
    )
    """Sampling temperatures; 0 is greedy. The first gives length, entropy and KL."""
    gold: bool = True
    """Compute the gold metric that the card names, where it names one."""
    match_entropy: bool = False
    """Also judge the first policy sampled at the temperature at which its entropy is that of each
    later one at 1: what a policy gains beyond it is more than samples that vary less."""
    held_out_prompts: Positive = 500
    """At most so many held-out prompts for reward accuracy and demonstration log-prob."""

    @field_validator("temperatures")
    @classmethod
    def _distinct(cls, temperatures: list[float]) -> list[float]:
        if len(set(temperatures)) != len(temperatures):
            raise ValueError("the same temperature twice")
        if temperatures[0] != 1.0:
            raise ValueError("the first temperature is 1.0: KL and entropy are measured there")
        return temperatures

    @model_validator(mode="after")
    def _entropy_is_judged(self) -> EvaluationOptions:
        if self.match_entropy and not self.gold:
            raise ValueError("match_entropy compares gold, and gold is false")
        return self


class Recipe(Options):
    """Everything that determines a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its folder is output_dir/NAME-seedSEED."""
    description: str = ""
    """What the recipe is for and the numbers it is expected to reach."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    """Seed of everything random."""
    output_dir: PathText = "runs"
    """Folder of the runs and of the store of stages that they share."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)
    """Trackers: tensorboard, wandb, trackio. They get the trainers' losses, and the loop's numbers
    by policy: KL, entropy, gold, pairs and reward."""
    data: DataOptions
    """Demonstrations."""
    model: ModelOptions
    """Policy start."""
    sft: SFTOptions = SFTOptions()
    """Supervised fine-tuning."""
    generation: GenerationOptions = GenerationOptions()
    """Sampling."""
    pairs: PairOptions = PairOptions()
    """Pairs."""
    reward: RewardOptions = RewardOptions()
    """Reward level."""
    policy_update: PolicyUpdateOptions = Field(
        default=BestOfNOptions(kind="best_of_n"), union_mode="smart"
    )
    """Policy level."""
    loop: LoopOptions = LoopOptions()
    """Outer loop."""
    evaluation: EvaluationOptions = EvaluationOptions()
    """Evaluation."""

    @model_validator(mode="after")
    def _adapters_fit(self) -> Recipe:
        if problem := lora_problem(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _edit_is_used(self) -> Recipe:
        update = self.policy_update
        edited = isinstance(update, PolicyPromptOptions) and update.edited_prompts > 0
        if self.data.edit is not None and not edited and self.pairs.contrast != "edit":
            raise ValueError(
                "data.edit is for pairs.contrast edit and policy_update.edited_prompts, "
                "and neither is set"
            )
        return self

    @model_validator(mode="after")
    def _entropies_are_alike(self) -> Recipe:
        plain = self.generation.top_p == 1.0 and self.generation.top_k == 0
        if self.evaluation.match_entropy and not plain:
            raise ValueError(
                "evaluation.match_entropy compares entropies of whole distributions: expected "
                "generation.top_p 1 and generation.top_k 0 with it"
            )
        return self

    @model_validator(mode="after")
    def _levels_agree(self) -> Recipe:
        kind, update = self.reward.kind, self.policy_update.kind
        if self.loop.iterations == 0:
            return self
        credit = getattr(self.policy_update, "credit", None)
        if self.reward.echo and credit in ("red", "abc"):
            raise ValueError(f"reward.echo has no rewards by token, which credit {credit} asks for")
        if (kind == "implicit") != (update == "identity"):
            raise ValueError(
                f"reward.kind {kind} does not go with policy_update.kind {update}: the implicit "
                "reward moves the policy itself, so it goes with identity, and only it does"
            )
        if kind == "none" and self.loop.pick == "nearest":
            raise ValueError("loop.pick nearest asks the last reward: reward.kind is none")
        if kind == "none" and update in ("best_of_n", "ppo"):
            raise ValueError(f"policy_update.kind {update} needs a reward: reward.kind is none")
        return self
