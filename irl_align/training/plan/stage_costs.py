"""What each stage of a run costs, by its role in the loop."""

from __future__ import annotations

from dataclasses import replace

from irl_align.config.policy_update import BestOfNOptions, PPOOptions
from irl_align.config.schema import Recipe
from irl_align.data.cards import load_card
from irl_align.data.loading import load_prompts
from irl_align.policy.roles import Role
from irl_align.training.plan.costs import Cost, Costs
from irl_align.training.plan.data import Counts
from irl_align.training.reward_step import scheduled

MATCHING = 6
"""Temperatures at which pi_0 is sampled until its entropy is another policy's: 5 or 6 on E2E."""


class StageCosts:
    """Costs of a recipe's stages: numbers of rows follow from the counts of its data."""

    def __init__(self, recipe: Recipe, counts: Counts, costs: Costs) -> None:
        self.recipe, self.counts, self.costs = recipe, counts, costs
        self.update = recipe.policy_update

    def of(self, role: Role) -> Cost:
        """Cost of the stage with this role; zero for the role of a policy update's own stage."""
        match role.kind:
            case "start":
                return self.costs.start()
            case "data":
                return self.costs.encode()
            case "sft":
                options, rows = self.recipe.sft, self.counts.rows["sft"]
                return self.costs.sft(rows, "SFTConfig", options.args, full=options.full)
            case "samples" if self._matches_entropy(role):
                return Cost()  # part of the cost of matched-entropy
            case "samples":
                return self.costs.sample(*self._drawn(role))
            case "selected":
                prompts, n = self._drawn(role)
                return self._rewards(prompts * n * self._candidates_each())
            case "pairs":
                return Cost(rows=self._pairs())
            case "offsets":  # log-probs of both sides, under two models, or rewards
                passes = 2 if self.recipe.offset == "log_ratio" else 1
                return self.costs.measure(2 * passes * self._pairs())
            case "reward":
                return self._reward(role.number or 0)
            case "candidate-rewards":
                return self._rewards(self._candidate_prompts() * self._candidates_each())
            case "policy":
                return self._policy()
            case _:
                return self._measuring(role)

    def _drawn(self, role: Role) -> tuple[int, int]:
        """Prompts, and samples of each."""
        counts, n = self.counts.prompts, self.recipe.generation.samples_per_prompt
        use = role.use.removesuffix("-candidates").removesuffix("-all-tokens")
        if use == "candidates":
            return self._candidate_prompts(), self._candidates_each()
        if use == "train":
            prompts = counts["reward"]
        elif use == "evaluation":
            prompts, n = self._evaluated(), 1
        else:
            prompts = self._measured() if self._is_measured(role) else counts["held_out"]
        return prompts, n * (self._candidates_each() if role.use.endswith("-candidates") else 1)

    def _is_measured(self, role: Role) -> bool:
        """Whether held-out samples are those of a policy's vital signs, and not only of pairs."""
        first = "policy-0" if self.recipe.sft.enabled else "start"
        policy = role.sampler == first or role.sampler.startswith("policy-")
        return policy and (role.temperature in (None, 1.0) or role.use != "held_out")

    def _matches_entropy(self, role: Role) -> bool:
        """Whether samples are those of a search for a temperature with a given entropy."""
        return role.use == "evaluation" and (
            role.temperature not in self.recipe.evaluation.temperatures
        )

    def _measured(self) -> int:
        return min(self.recipe.evaluation.held_out_prompts, self.counts.prompts["held_out"])

    def _evaluated(self) -> int:
        prompts = self.counts.prompts["evaluation"]
        return min(self.recipe.evaluation.prompts or prompts, prompts)

    def _candidates_each(self) -> int:
        return self.update.n if isinstance(self.update, BestOfNOptions) else 1

    def _candidate_prompts(self) -> int:
        update, prompts = self.update, self.counts.prompts["reward"]
        assert isinstance(update, BestOfNOptions)
        prompts *= 2 if update.edited_prompts else 1
        if update.prompts_from is not None:
            prompts += len(load_prompts(load_card(self.recipe.data.card), update.prompts_from))
        return min(update.prompts or prompts, prompts)

    def _pairs(self) -> int:
        """Pairs of every demonstration, by source."""
        options, rows = self.recipe.pairs, self.counts.rows["reward"]
        prompts = self.counts.prompts["reward"]
        samples = prompts * self.recipe.generation.samples_per_prompt
        used = min(rows, prompts * (options.demonstrations_per_prompt or rows))
        contrast = options.contrast_per_demonstration * options.contrast_edits
        pairs = {
            "demonstration/contrast": rows * contrast * (1 + options.contrast_crossed),
            **dict.fromkeys(("sft/init", "policy/sft", "policy/older"), samples),
        }
        # A prompt's demonstrations and samples take turns.
        return sum(pairs.get(source, max(used, samples)) for source in options.sources)

    def _reward(self, k: int) -> Cost:
        options, window = self.recipe.reward, self.recipe.pairs.window
        iterations = {"latest": 1, "all": k + 1}.get(window) or int(window.removeprefix("last-"))
        pairs = self._pairs() * min(iterations, k + 1)
        pairs = min(pairs, options.max_pairs or pairs)
        args = scheduled(options.args, options.schedule, k)
        if options.kind == "implicit":
            return self.costs.sft(pairs, "DPOConfig", args)
        models = self.costs.reward_models()  # an ensemble's, fitted one after the other
        cost = self.costs.reward_fit(models * pairs, args)
        return replace(cost, disk=models * cost.disk)

    def _policy(self) -> Cost:
        update = self.update
        if isinstance(update, PPOOptions):
            return self.costs.ppo(update)
        if isinstance(update, BestOfNOptions):
            config = "SFTConfig" if update.use == "sft" else "DPOConfig"
            return self.costs.sft(self._candidate_prompts() * update.keep, config, update.args)
        # More SFT or IQLearn. The user's own update costs at least as much.
        rows = self.counts.rows["sft" if self.recipe.reward.kind == "none" else "reward"]
        return self.costs.sft(rows, "SFTConfig", getattr(update, "args", {}))

    def _measuring(self, role: Role) -> Cost:
        held_out, evaluated = self.counts.rows["held_out"], self._evaluated()
        match role.kind, role.use:
            case "vitals", _:
                samples = self._measured() * self.recipe.generation.samples_per_prompt
                return self.costs.measure(3 * (held_out + samples))
            case "reward-report", _:
                return self.costs.measure(2 * held_out)
            case "pick", _:
                return self.costs.measure(2 * self.counts.prompts["held_out"])
            case "matched-entropy", _:
                return self.costs.sample(MATCHING * evaluated, 1)
            case "evaluation", "rewards":
                update = self.update
                selects = isinstance(update, BestOfNOptions) and update.use == "select"
                answers = 1 if selects else len(self.recipe.evaluation.temperatures)
                return self._rewards(evaluated * answers)
            case "evaluation", "" if role.temperature == 1.0:
                return self.costs.measure(evaluated)
            case "evaluation", "":
                return Cost(rows=evaluated)
        return Cost()

    def _rewards(self, samples: int) -> Cost:
        """One pass of the reward over samples, and of each model of an ensemble."""
        length, each = self.costs.prompt.mean + self.costs.sample_mean, self.costs.reward_bytes()
        names = [f"reward {i}".removesuffix(" 0") for i in range(self.costs.reward_models())]
        return self.costs.score(samples, length, dict.fromkeys(names, float(each)))
