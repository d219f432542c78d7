"""How the sampling budget is spent and what is learnt from it: TRACE, its baselines and the value predictor."""

from typing import Annotated, Literal

from pydantic import Field

from trace_async.config.section import built_in_or_own, require, section
from trace_async.config.task import Device
from trace_async.method.combinations import budget_faults, loss_faults
from trace_async.method.registry import AGGREGATION, CREDIT, OBJECTIVE, STAGE1, STAGE2


@section("budget")
class BudgetConfig:
    """The sampling budget of one update and how it is spent (docs/METHOD.md).

    A round spends M root rollouts over a pool of candidate prompts (Stage 1), and then, inside each prompt that got m
    of them, N·m continuations of prefixes (Stage 2). It costs M·(1 + N/2) trajectory equivalents.
    """

    root_rollouts: Annotated[int, Field(ge=2)] = 64
    """M: root rollouts of a round (alias train_batch_size × n)."""
    continuations_per_root: Annotated[int, Field(ge=0)] = 2
    """N: continuations per root rollout of a prompt. 0: none."""
    pool_size: Annotated[int, Field(ge=1)] = 192
    """Candidate prompts of a round, among which Stage 1 chooses."""
    min_rollouts: Annotated[int, Field(ge=0)] = 0
    """The fewest root rollouts that a candidate prompt gets."""
    max_rollouts: Annotated[int, Field(ge=2)] = 8
    """The most root rollouts that a prompt gets. At least 2: one rollout cannot disagree."""
    uniform_rollouts: Annotated[int, Field(ge=2)] = 8
    """Root rollouts of every prompt under stage1=uniform and its relatives (alias n, group size, num_generations)."""
    max_per_prefix: Annotated[int, Field(ge=1)] | None = None
    """The most continuations that one prefix gets. null: as many as the prompt has."""
    stage1: Annotated[str, built_in_or_own(STAGE1)] = "beta"
    """How root rollouts are shared among prompts: uniform (every prompt the same) | point and beta (TRACE, from a point
    estimate or a posterior of the success rate) | price (beta, at one price per token for both stages) | thompson
    (MoPPS) | pcl | vip | dapo (dynamic sampling) | package.module:Class of your own
    (trace_async.method.stage1.rule)."""
    stage2: Annotated[str, built_in_or_own(STAGE2)] = "contrast"
    """Which prefixes are continued: none | random | contrast (TRACE) | contrast_per_token (its value per generated
    token) | contrast_value_only | price (one price for all prompts, their budget in tokens) | topup (further roots of
    prompts whose roots agree, at one price; no continuations) | package.module:Class of your own
    (trace_async.method.stage2.rule)."""
    continuations: Literal["always", "auto", "auto_seconds"] = "always"
    """always | auto: continuations are bought only after turns where, by what was measured, they teach more than new
    root rollouts of the same tokens (docs/METHOD.md, section 4); terminal and MLflow say what was decided and why |
    auto_seconds: of the same seconds."""
    stage2_rounds: Annotated[int, Field(ge=1)] = 1
    """The continuations of a prompt are spent in so many rounds, later ones also from prefixes of earlier ones
    (Tree-GRPO's L)."""
    warmup_rounds: Annotated[int, Field(ge=0)] = 0
    """The first so many rounds use stage1=uniform. They are charged like all others."""
    warmup_rollouts: Annotated[int, Field(ge=2)] = 2
    """Root rollouts of a prompt in those rounds; small groups show the predictor more prompts."""
    oracle_rollouts: Annotated[int, Field(ge=0)] = 0
    """For understanding only: where rules ask for a value, so many rollouts of the current policy measure it for every
    prompt and prefix, uncharged, in place of the predictor. 0: off."""
    explore_share: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the root rollouts that goes to pairs on candidates drawn at random, whatever is believed of them: only
    so is it seen what the policy forgets. null: 0.125 with rules that explore (point, beta), none with others."""

    def __post_init__(self) -> None:
        require(self.min_rollouts <= self.max_rollouts, "budget.min_rollouts", self.min_rollouts, "≤ max_rollouts")
        require(
            self.pool_size * self.min_rollouts <= self.root_rollouts,
            "budget.min_rollouts",
            self.min_rollouts,
            f"pool_size·min_rollouts must not exceed root_rollouts={self.root_rollouts}",
        )
        require(
            self.pool_size * self.max_rollouts >= self.root_rollouts,
            "budget.pool_size",
            self.pool_size,
            f"pool_size·max_rollouts must reach root_rollouts={self.root_rollouts}",
        )
        for setting, found, rule in budget_faults(self):
            require(False, setting, found, rule)


@section("predictor")
class PredictorConfig:
    """The value model that estimates V(H). It steers the allocation and never enters the policy's gradient.

    With trunk=policy only a small head learns, and `learning_rate` to `replay_trees` say nothing. With trunk=own it
    learns, after every update, on whole finished trees and then in cheap steps on prompts alone.
    """

    trunk: Literal["auto", "own", "policy"] = "auto"
    """policy (the policy's own hidden states, at the weights that are served, under a small head that is refitted at
    every update) | own (the paper's: a model of its own) | auto (policy; own where `path` names a model, or where
    engine.lora_rank sends adapters only)."""
    path: str = ""
    """A Hugging Face directory to start from (trunk=own). Empty: the first layers of the start policy itself."""
    num_layers: Annotated[int, Field(ge=0)] = 2
    """With an empty `path`: how many of the policy's layers. 0: all."""
    prefix_layers: Annotated[int, Field(ge=0)] | None = None
    """trunk=policy: the state of a prefix is read after so many layers, that of a prompt after `num_layers`. null: both
    after `num_layers`; 0: after all, which costs nothing where the engine gives its states (backend=torch)."""
    pooled_tokens: Annotated[int, Field(ge=1)] = 10
    """trunk=policy: a history's state is the mean over so many of its last tokens."""
    window_versions: Annotated[int, Field(ge=1)] = 32
    """trunk=policy: the head is fitted to what was read under the last so many policy versions."""
    head_l2: Annotated[float, Field(ge=0)] = 10.0
    """trunk=policy: L2 penalty on the head's weights (in units of the states' standard deviations), as against the sum
    of the losses of all rows."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of its trunk."""
    head_lr_scale: Annotated[float, Field(gt=0)] = 1.0
    """Its head learns so many times as fast as its trunk."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of AdamW."""
    loss: Literal["mse", "bce"] = "bce"
    """bce (cross entropy of the reward, between 0 and 1) | mse (the paper's)."""
    prompt_steps_per_update: Annotated[int, Field(ge=0)] = 2
    """Steps on prompts alone after every update."""
    warmup_steps: Annotated[int, Field(ge=0)] = 16
    """So many more steps on prompts after the first update, and half as many again after each that follows."""
    prompt_tokens_per_step: Annotated[int, Field(ge=1)] = 1024
    """Tokens of prompts in one of those steps."""
    steps_per_update: Annotated[int, Field(ge=0)] = 2
    """Steps on whole trees after every update. 0: the predictor never learns, whatever its trunk."""
    trees_per_step: Annotated[int, Field(ge=1)] = 8
    """Trees in one of those steps."""
    max_tokens_per_forward: Annotated[int, Field(ge=1)] = 8192
    """Tokens that it takes at once; bounds its memory. A single longer tree is still taken whole."""
    replay_trees: Annotated[int, Field(ge=1)] = 512
    """It learns from so many of the last finished trees."""
    prior_strength: Annotated[float, Field(gt=0)] = 4.0
    """How many pseudo rollouts its estimate is worth beside a prompt's own counts (stage1=beta)."""
    fit_prior_strength: bool = True
    """`prior_strength` holds only at first and is then fitted to what came out."""
    count_half_life: Annotated[float, Field(ge=0)] = 8.0
    """A prompt's counts lose half their weight in so many policy versions. 0: never."""
    device: Device = "auto"
    """Where it computes. auto: on a GPU where there is one (docs/clusters.md has the rule)."""
    num_replicas: Annotated[int, Field(ge=0)] = 0
    """So many further processes answer with what one learns. 0: the one that learns answers too."""
    num_threads: Annotated[int, Field(ge=1)] = 1
    """CPU threads of each of its processes, which Ray also reserves for it."""

    @property
    def layers_of_prefixes(self) -> int:
        """Layers under a prefix's state with trunk=policy; 0: all."""
        return self.num_layers if self.prefix_layers is None else self.prefix_layers

    def __post_init__(self) -> None:
        alone = self.trunk != "policy" or not self.path
        require(
            alone, "predictor.path", self.path, "trunk=policy reads the policy itself; leave it empty, or trunk=own"
        )


@section("loss")
class LossConfig:
    """The policy-gradient loss. Clipping is on the ratio learner / generator at the sampling temperature."""

    advantage: Annotated[str, built_in_or_own(CREDIT)] = "trace"
    """Credit of a token: trace | trace_fresh (its baseline without the rollout that passed) | tree_grpo | tree_rpo |
    treepo | grpo | gigpo (turns against turns from the same state) | package.module:Class of your own
    (trace_async.method.credit.rule). Alias adv_estimator."""
    normalize_std: bool = False
    """Divide a group's advantages by their standard deviation, as GRPO does (alias norm_adv_by_std_in_grpo)."""
    objective: Annotated[str, built_in_or_own(OBJECTIVE)] = "ppo"
    """ppo: a clipped token has no gradient | cispo: its weight is clipped and every token keeps its gradient
    (MiniMax-M1, arXiv 2506.13585; only `eps_clip_high` counts) | package.module:Class of your own
    (trace_async.method.objective.rule)."""
    mask_low: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Tokens that the learner finds less than so many times as likely as the generator did are left out. 0: none is."""
    mask_high: Literal[0] | Annotated[float, Field(gt=1)] = 0.0
    """So are those that it finds more than so many times as likely (IcePop: 0.5 and 5). 0: none is."""
    eps_clip_low: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The ratio is clipped below 1 − this (alias clip_ratio_low, epsilon)."""
    eps_clip_high: Annotated[float, Field(gt=0)] = 0.28
    """The ratio is clipped above 1 + this (alias clip_ratio_high, epsilon_high)."""
    dual_clip: Literal[0] | Annotated[float, Field(gt=1)] = 0.0
    """Bound on the ratio where the advantage is negative (alias clip_ratio_c; usual: 3). 0: off."""
    kl_loss_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence to the start policy (alias kl_coef, beta). 0: no reference policy is loaded."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence (Schulman, "Approximating KL divergence"); alias kl_loss_type."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus (alias entropy_coeff)."""
    correction: Literal["none", "decoupled", "tis"] = "none"
    """Of the difference between generator and learner: none | decoupled (AReaL, arXiv 2505.24298) | tis (truncated
    importance weights)."""
    tis_cap: Annotated[float, Field(ge=1)] = 2.0
    """Where correction=tis truncates its weights (alias tis_imp_ratio_cap)."""
    aggregation: Annotated[str, built_in_or_own(AGGREGATION)] = "constant"
    """What the loss is divided by (alias loss_agg_mode): constant (`divisor_tokens` a prompt; alone unbiased) | token |
    sequence | prompt (a weighted mean over tokens, rollouts, prompts; biased towards short successes and long
    failures) | package.module:Class of your own (trace_async.method.aggregation)."""
    divisor_tokens: Annotated[float, Field(gt=0)] = 64.0
    """With aggregation=constant: tokens of a rollout, roughly. Adam is indifferent to it; learner.max_grad_norm is
    not."""

    def __post_init__(self) -> None:
        for setting, found, rule in loss_faults(self):
            require(False, setting, found, rule)
