"""Rewards with another tokenizer: boundaries by hand, and scores against those of the texts."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.other_tokenizers import SPECIAL, wordpiece, words
from support.rows import Ids, random_ids, save
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from irl_align.data.decoding import TokenFormat
from irl_align.data.rows import Prompt
from irl_align.errors import UserError
from irl_align.reward.alignment import (
    AlignedReward,
    TokenBytes,
    for_policy,
    same_tokenizer,
    shared_prefixes,
)
from irl_align.reward.model import RewardModel
from irl_align.reward.protocol import ScoreRequest
from irl_align.reward.scoring import score_tokens
from irl_align.reward.settings import RewardSettings

MakeModel = Callable[[str], PreTrainedModel]


def renumbered(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokens and merges with ids in the opposite order."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    last = len(tokenizer) - 1
    state["model"]["vocab"] = {w: last - i for w, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = last - token["id"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **SPECIAL
    )


def metaspace() -> PreTrainedTokenizerFast:
    """Characters and bytes as in Llama 2: spaces are ▁, one is put first and decoded away."""
    names = ["<unk>", "<pad>", "<bos>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "a", "b", "p", "u", "pu", "▁pu"]
    vocabulary = {name: number for number, name in enumerate(names)}
    model = models.BPE(
        vocabulary, [("p", "u"), ("▁", "pu")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **SPECIAL)


def lowercasing() -> PreTrainedTokenizerFast:
    tokenizer = words()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def form(
    tokenizer: PreTrainedTokenizerFast, prompts: dict[tuple[int, ...], Prompt] | None = None
) -> TokenFormat:
    """A policy that reads its prompts as they are."""
    return TokenFormat(tokenizer, RewardSettings(), prompts or {})


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture
def reward_with(
    tiny_model: MakeModel, tmp_path: Path
) -> Callable[[PreTrainedTokenizerFast], RewardModel]:
    """``reward_with(tokenizer)``: a tiny reward that reads this tokenizer's ids."""

    def make(tokenizer: PreTrainedTokenizerFast) -> RewardModel:
        model = tiny_model("llama")
        model.config.pad_token_id = tokenizer.pad_token_id
        folder = save(model, tokenizer, tmp_path / "policy-of-reward")
        return RewardModel.from_policy(folder, tokenizer, RewardSettings(mean=0.5), seed=1)

    return make


# --- boundaries -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "reward", "expected"),
    [
        ([0, 2, 5, 7], [0, 2, 5, 7], [0, 1, 2, 3]),
        ([0, 2, 5, 7], [0, 3, 5, 6, 7], [0, 0, 2, 4]),  # 2 is inside their first token
        ([0, 3, 7], [0, 1, 2, 3, 4, 7], [0, 3, 5]),
        ([0, 1, 2, 7], [0, 7], [0, 0, 0, 1]),
        ([0, 2, -1, 5], [0, 2, 4, 5], [0, 1, 1, 3]),  # a token that ends inside a character
        ([0, 2, 4, 5], [0, 2, -1, 5], [0, 1, 1, 3]),
        ([0, 0, 3], [0, 0, 3], [0, 1, 2]),  # tokens without text
        ([0], [0], [0]),
    ],
)
def test_shared_prefixes_by_hand(policy: list, reward: list, expected: list) -> None:
    assert shared_prefixes(np.array(policy), np.array(reward)).tolist() == expected


def test_token_bytes_boundaries_by_hand(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Cumulated bytes, spaces and letters of several bytes included."""
    table = TokenBytes(tiny_tokenizer)
    text = "The Punter é🙂"
    own = ids(tiny_tokenizer, text)
    ends = table.boundaries(own, text)
    assert ends.tolist() == np.cumsum([0, *(len(table.table[i]) for i in own)]).tolist()
    assert ends[-1] == 10 + 1 + 2 + 4
    assert b"".join(table.table[i] for i in own) == text.encode()
    assert table.boundaries([*own, tiny_tokenizer.eos_token_id], text).tolist() == [*ends, ends[-1]]
    assert table.boundaries(own, "another text") is None


def test_token_bytes_boundaries_of_metaspace_tokens() -> None:
    """▁ is put first and does not count; é and characters unknown to the vocabulary are bytes."""
    tokenizer = metaspace()
    table = TokenBytes(tokenizer)
    text = "pu aé"
    own = ids(tokenizer, text)
    assert tokenizer.convert_ids_to_tokens(own) == ["▁pu", "▁", "a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(own) == text
    assert table.boundaries(own, text).tolist() == [0, 2, 3, 4, -1, 6]


def test_token_bytes_count_replacement_characters(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    """A policy can sample half of a letter; a replacement character has 3 bytes."""
    half = ids(tiny_tokenizer, "é")[:1]
    assert TokenBytes(tiny_tokenizer).table[half[0]] == "é".encode()[:1]
    own = [*ids(tiny_tokenizer, "a"), *half, *ids(tiny_tokenizer, "b"), *half]
    text = tiny_tokenizer.decode(own)
    assert text == "a�b�"
    assert TokenBytes(tiny_tokenizer).boundaries(own, text).tolist() == [0, 1, -1, 5, 8]


# --- the same tokenizer ---------------------------------------------------------------------------


def test_same_tokenizer_compares_ids(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    saved = tiny_tokenizer.save_pretrained(tmp_path)
    assert saved and same_tokenizer(
        tiny_tokenizer, PreTrainedTokenizerFast.from_pretrained(tmp_path)
    )
    assert not same_tokenizer(tiny_tokenizer, words())
    assert not same_tokenizer(tiny_tokenizer, renumbered(tiny_tokenizer))
    padded = copy.deepcopy(tiny_tokenizer)
    padded.add_special_tokens({"pad_token": "<|pad|>"})
    assert same_tokenizer(tiny_tokenizer, padded)
    other_end = copy.deepcopy(tiny_tokenizer)
    other_end.eos_token = "<bos>"
    assert not same_tokenizer(tiny_tokenizer, other_end)


def test_for_policy_returns_a_reward_with_the_same_tokenizer(
    reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reward = reward_with(tiny_tokenizer)
    assert for_policy(reward, form(copy.deepcopy(tiny_tokenizer))) is reward


# --- another tokenizer ----------------------------------------------------------------------------

TEXTS = ["The Punter is a cheap pub.", "x", "", "near the river é🙂, there"]


def test_aligned_reward_is_unchanged_by_other_ids(
    reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Every boundary is shared, so all values are those of the reward's own ids."""
    policy = renumbered(tiny_tokenizer)
    reward = reward_with(tiny_tokenizer)
    aligned = for_policy(reward, form(policy))
    assert isinstance(aligned, AlignedReward)

    def rows(tokenizer: PreTrainedTokenizerFast) -> tuple[Ids, Ids]:
        prompts = [[tokenizer.bos_token_id, *ids(tokenizer, f"name = {i % 2}")] for i in range(4)]
        ends = [[tokenizer.eos_token_id], [], [tokenizer.eos_token_id], []]
        return prompts, [ids(tokenizer, t) + e for t, e in zip(TEXTS, ends, strict=True)]

    prompts, completions = rows(tiny_tokenizer)
    prompts = [prompt[1:] for prompt in prompts]  # this tokenizer puts no BOS first
    for eos in (False, True):
        wanted = {"prefixes": True, "attention": True, "eos_prefixes": eos}
        expected = score_tokens(reward, ScoreRequest(prompts, completions, **wanted))
        scores = score_tokens(aligned, ScoreRequest(*rows(policy), **wanted))
        assert torch.equal(scores.rewards, expected.rewards)
        assert torch.equal(scores.prefixes, expected.prefixes)
        torch.testing.assert_close(scores.attention, expected.attention, atol=1e-6, rtol=0)
    for row, values in enumerate(aligned.prefix_scores_ids(*rows(policy))):
        alone = reward.prefix_scores_ids(prompts[row : row + 1], completions[row : row + 1])[0]
        torch.testing.assert_close(values, alone, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(aligned.score_ids(*rows(policy)), expected.rewards)


@pytest.mark.parametrize("policy_kind", ["words", "metaspace"])
def test_aligned_reward_uses_the_longest_shared_prefix(
    policy_kind: str, reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Searched for character by character in the texts, with the reward's own prefix scores."""
    policy = {"words": words, "metaspace": metaspace}[policy_kind]()
    reward = reward_with(tiny_tokenizer)
    aligned = for_policy(reward, form(policy))
    prompt = "near a pub"
    texts = ["The Punter is a cheap pub.", "there is a river"]
    stops = [True, False]
    completions = [
        ids(policy, text) + [policy.eos_token_id] * stop
        for text, stop in zip(texts, stops, strict=True)
    ]
    scores = aligned.score_tokens(
        ScoreRequest([ids(policy, prompt)] * 2, completions, prefixes=True, attention=True)
    )
    shared = carried = 0
    for row, (text, stop) in enumerate(zip(texts, stops, strict=True)):
        theirs = ids(tiny_tokenizer, text) + [tiny_tokenizer.eos_token_id] * stop
        their_scores = reward.prefix_scores_ids([ids(tiny_tokenizer, prompt)], [theirs])[0]
        weights = score_tokens(
            reward, ScoreRequest([ids(tiny_tokenizer, prompt)], [theirs], attention=True)
        ).attention[0]
        count = len(completions[row])
        own_texts = [policy.decode(completions[row][:t]) for t in range(count)]
        their_texts = [tiny_tokenizer.decode(theirs[:j]) for j in range(len(theirs))]
        places = [0]
        for t in range(1, count):
            if own_texts[t] in their_texts:
                places.append(
                    max(j for j, their in enumerate(their_texts) if their == own_texts[t])
                )
                shared += 1
            else:
                places.append(places[-1])
        places.append(len(theirs))
        expected = their_scores[places]
        torch.testing.assert_close(scores.prefixes[row, : count + 1], expected, atol=1e-6, rtol=0)
        mass = [float(weights[a:b].sum()) for a, b in itertools.pairwise(places)]
        assert scores.attention[row, :count].tolist() == pytest.approx(mass, abs=1e-6)
        assert float(scores.rewards[row]) == pytest.approx(float(their_scores[-1]), abs=1e-6)
        carried += len(places) - len(set(places))
    assert shared > 8
    assert carried > 0, "some tokens have no boundary of their own"


def test_aligned_reward_appends_eos_where_the_policy_stopped(
    reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    policy, reward = words(), reward_with(tiny_tokenizer)
    aligned = for_policy(reward, form(policy))
    prompt, text = ids(policy, "near"), ids(policy, "a cheap pub")
    theirs = ids(tiny_tokenizer, "near"), ids(tiny_tokenizer, "a cheap pub")
    scores = aligned.score_ids(
        [prompt] * 3, [text, [*text, policy.eos_token_id], [policy.eos_token_id]]
    )
    end = tiny_tokenizer.eos_token_id
    expected = reward.score_ids([theirs[0]] * 3, [theirs[1], [*theirs[1], end], [end]], None)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    assert abs(float(scores[0] - scores[1])) > 1e-3
    stopped = aligned.prefix_scores_ids([prompt], [[*text, policy.eos_token_id]])[0]
    assert float(stopped[-2]) == pytest.approx(float(expected[0]), abs=1e-6)
    assert float(stopped[-1]) == pytest.approx(float(expected[1]), abs=1e-6)


def test_aligned_reward_reads_special_tokens_in_text_as_text(
    reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    policy, reward = words(), reward_with(tiny_tokenizer)
    spelled = policy("a <eos> b", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert policy.eos_token_id not in spelled
    score = for_policy(reward, form(policy)).score_ids([ids(policy, "x")], [spelled])
    theirs = tiny_tokenizer("a <eos> b", add_special_tokens=False, split_special_tokens=True)
    assert len(theirs["input_ids"]) > 5
    expected = reward.score_ids([ids(tiny_tokenizer, "x")], [theirs["input_ids"]], None)
    torch.testing.assert_close(score, expected, atol=1e-6, rtol=0)


def test_aligned_reward_credits_bytes_that_are_no_text_at_the_end(
    reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """The reward's tokenizer composes e and an accent to é: no boundary exists inside."""
    reward = reward_with(tiny_tokenizer)
    reward.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    policy = words()
    completion = ids(policy, "a cafe\u0301")
    values = for_policy(reward, form(policy)).prefix_scores_ids([ids(policy, "x")], [completion])[0]
    assert len(set(values[:-1].tolist())) == 1
    assert values[-1] != values[0]


def test_aligned_reward_scores_any_sampled_ids(
    reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Special tokens in the middle and broken letters: finite, and equal to the plain rewards."""
    policy = words()
    aligned = for_policy(reward_with(tiny_tokenizer), form(policy))
    completions = random_ids(6, 1, 12, seed=4, vocabulary=len(policy))
    completions[0] = [5, policy.bos_token_id, 6, policy.pad_token_id, 7]
    prompts = [ids(policy, "x")] * 6
    scores = score_tokens(
        aligned, ScoreRequest(prompts, completions, prefixes=True, attention=True)
    )
    torch.testing.assert_close(scores.rewards, aligned.score_ids(prompts, completions))
    for row, completion in enumerate(completions):
        assert scores.prefixes[row, len(completion)] == scores.rewards[row]
        assert not scores.prefixes[row, len(completion) + 1 :].any()
        assert not scores.attention[row, len(completion) :].any()


def test_aligned_reward_applies_its_own_template(
    reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    reward, policy = reward_with(tiny_tokenizer), words()
    reward.settings = RewardSettings(template="Q: {prompt} A:")
    prompt, completion = [*ids(policy, "wrapped"), policy.bos_token_id], ids(policy, "pub")
    raw = {tuple(prompt): "near"}
    aligned = for_policy(reward, form(policy, raw))
    expected = reward.score_ids(
        [ids(tiny_tokenizer, "Q: near A:")], [ids(tiny_tokenizer, "pub")], None
    )
    torch.testing.assert_close(aligned.score_ids([prompt], [completion]), expected)
    with pytest.raises(UserError, match=r"a prompt holds '<bos>', a special token of"):
        for_policy(reward, form(policy)).score_ids([prompt], [completion])


@pytest.mark.parametrize("side", ["policy", "reward"])
def test_aligned_reward_refuses_tokenizers_not_spelled_in_bytes(
    side: str, reward_with: Callable, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """For token-level scores only: whole rewards need no boundaries."""
    for odd in (lowercasing(), wordpiece(tmp_path)):
        reward = reward_with(odd if side == "reward" else tiny_tokenizer)
        policy = tiny_tokenizer if side == "reward" else odd
        if odd.eos_token is None:
            odd.add_special_tokens({"eos_token": "[SEP]"})
        aligned = for_policy(reward, form(policy))
        prompts, completions = [ids(policy, "ab")], [ids(policy, "cd")]
        assert aligned.score_ids(prompts, completions).isfinite().all()
        with pytest.raises(UserError, match=r"reward.tokenizer: .* cannot be aligned byte by byte"):
            aligned.prefix_scores_ids(prompts, completions)
