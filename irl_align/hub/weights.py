"""Make models loadable by any tool: fold a reward's normaliser into its weights, write chat
templates.

Legend of shapes: B rows, L tokens, H width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.data.encoding import Templated, encode_prompts
from irl_align.models.lora import has_adapter
from irl_align.models.packing import TOKENS_PER_BATCH, batches_by_tokens, pad_right
from irl_align.reward.forward import score_head
from irl_align.reward.model import RewardModel

_TEMPLATE = """\
{{%- if messages[0]['role'] == 'system' or messages | length > 2 -%}}
{{{{- raise_exception('this model takes one user turn and one assistant turn') -}}}}
{{%- endif -%}}
{bos}
{{%- for message in messages -%}}
{{%- if message['role'] == 'user' -%}}
{{{{- {before} + message['content']{cased} + {after} -}}}}
{{%- else -%}}
{{{{- message['content']{cased} + eos_token -}}}}
{{%- endif -%}}
{{%- endfor -%}}
{echo}"""


_ECHO = """
{{{{- {before} + messages[0]['content']{cased} + {after} + eos_token -}}}}
"""


def fold_normaliser(reward: RewardModel) -> None:
    """Move as much of the normaliser as possible into the weights; scores stay the same.

    The score is (r - mean) / std with r = w.h + a lm, perhaps bounded by b tanh(r / b). std divides
    w, a and b; this is exact, since b tanh(u / b) / s = (b / s) tanh((u / s) / (b / s)). The mean
    goes into the bias c of the norm before the head, c' = c - mean w / |w|^2, if that norm has a
    bias (LayerNorm of GPT-2, GPT-NeoX) and r is the head's output only. Otherwise the mean stays in
    the settings: the head and an RMSNorm have no bias, and an adapter's base must not change.
    """
    settings, head = reward.settings, score_head(reward.model)
    std = settings.std
    with torch.no_grad():
        head.weight.div_(std)
        settings = replace(
            settings,
            std=1.0,
            mean=settings.mean / std,
            lm_coef=settings.lm_coef / std,
            bound=None if settings.bound is None else settings.bound / std,
        )
        weight = head.weight[0].double()  # (H,)
        norm = None if has_adapter(reward.model) else final_norm(reward.model)
        head_alone = not settings.lm_coef and settings.bound is None
        if head_alone and norm is not None and weight.any():
            norm.bias.sub_((settings.mean * weight / (weight @ weight)).to(norm.bias.dtype))
            settings = replace(settings, mean=0.0)
    reward.settings = settings


def final_norm(model: PreTrainedModel) -> torch.nn.LayerNorm | None:
    """The LayerNorm with a bias whose output is the last hidden state; None if there is none."""
    outputs: dict[torch.nn.LayerNorm, Tensor] = {}

    def record(module: Any, _: Any, output: Tensor) -> None:
        outputs[module] = output

    norms = [
        module
        for module in model.base_model.modules()
        if isinstance(module, torch.nn.LayerNorm) and module.bias is not None
    ]
    hooks = [norm.register_forward_hook(record) for norm in norms]
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
    for hook in hooks:
        hook.remove()
    final = [norm for norm, output in outputs.items() if torch.equal(output, hidden)]
    return final[-1] if final else None


def chat_template(
    card: Templated, tokenizer: PreTrainedTokenizerBase, echo: bool = False
) -> str | None:
    """A chat template that writes the same as the card's plain template, with EOS at the end.

    None where the card uses the tokenizer's own chat template. echo: the prompt and EOS follow
    again, as a reward with that setting reads them.
    """
    if card.template == "chat":
        return None
    before, _, after = card.template.format(prompt="\0").partition("\0")
    first = encode_prompts(["a"], tokenizer, card)[0][0]
    adds_bos = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    bos = "{{- bos_token -}}" if adds_bos else ""
    texts = {
        "before": json.dumps(before, ensure_ascii=False),
        "after": json.dumps(after, ensure_ascii=False),
        "cased": " | lower" if card.lowercase else "",
    }
    return _TEMPLATE.format(bos=bos, echo=bos + _ECHO.format(**texts) if echo else "", **texts)


@torch.no_grad()
def plain_scores(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits (B,) of rows of L token ids by transformers alone, as any other tool computes them."""
    scores = torch.empty(len(rows))
    for batch in batches_by_tokens([len(row) for row in rows], TOKENS_PER_BATCH):
        ids, mask = pad_right([rows[i] for i in batch], int(model.config.pad_token_id))
        ids, mask = ids.to(model.device), mask.to(model.device)
        scores[batch] = model(input_ids=ids, attention_mask=mask).logits[:, 0].float().cpu()
    return scores


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], completions: Sequence[str]
) -> list[list[int]]:
    """Token ids of single-turn chats by the tokenizer's chat template."""
    chats = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    render: Callable[..., Any] = tokenizer.apply_chat_template
    ids: list[list[int]] = render(chats, return_dict=False)
    return ids
