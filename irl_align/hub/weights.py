"""Make models loadable by any tool: fold a reward's mean into its weights, write chat
templates that end where a text is scored.

Legend of shapes: B rows, L tokens, H width.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from irl_align.data.encoding import Templated, encode_prompts
from irl_align.errors import UserError
from irl_align.models.loading import has_capped_attention, load_config
from irl_align.models.lora import has_adapter
from irl_align.reward.forward import score_head
from irl_align.reward.model import RewardModel
from irl_align.reward.settings import RewardSettings
from irl_align.utils.files import atomic_write, to_json

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
# These follow a macro irl_chat(messages, add_generation_prompt): the tokenizer's own template.
_LOWERED = """
{%- set irl = namespace(turns=[]) -%}
{%- for turn in messages -%}
{%- set irl.turns = irl.turns + [dict(turn, content=turn['content'] | lower)] -%}
{%- endfor -%}
{%- set messages = irl.turns -%}"""
_ENDED = """
{%- if messages[-1]['role'] == 'assistant' -%}
{%- set before = irl_chat(messages[:-1], true) -%}
{%- set whole = irl_chat(messages, false) -%}
{{- before + whole[before | length :].split(eos_token)[0] + eos_token ECHO -}}
{%- else -%}
{{- irl_chat(messages, add_generation_prompt) -}}
{%- endif -%}"""


def save_plain(reward: RewardModel, folder: Path) -> None:
    """Write a reward so that transformers alone gives its score of a chat, as far as it can."""
    fold_mean(reward)
    reward.tokenizer.chat_template = scored_template(reward.settings, reward.tokenizer)
    config = reward.model.config
    config.id2label, config.label2id = {0: "reward"}, {"reward": 0}
    config.problem_type = "regression"  # the pipeline of transformers then applies no sigmoid
    reward.save_pretrained(folder)
    keep_attention(folder)


def as_one_head(reward: RewardModel) -> None:
    """Replace an ensemble's heads by one that gives their mean; exact, since heads are linear.

    Raises UserError: the ensemble has a penalty or a bound, which are not linear.
    """
    settings, head = reward.settings, score_head(reward.model)
    if settings.penalty is None:
        return
    if settings.penalty or settings.bound is not None:
        raise UserError(
            f"export: found an ensemble with penalty {settings.penalty:g} and bound "
            f"{settings.bound}, expected penalty 0 and no bound: only the mean of heads is a head"
        )
    with torch.no_grad():
        head.weight = torch.nn.Parameter(head.weight.mean(0, keepdim=True))
    head.out_features = reward.model.config.num_labels = 1
    centre = sum(settings.centres) / len(settings.centres)
    reward.settings = replace(settings, penalty=None, centres=[], mean=settings.mean + centre)


def keep_attention(folder: Path) -> None:
    """Have other tools load a model with the attention that irl-align loads it with."""
    if has_capped_attention(load_config(folder)):
        edit_json(folder / "config.json", attn_implementation="eager")


def edit_json(file: Path, **values: Any) -> None:
    """Set values in a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    atomic_write(file, to_json(content | values, indent=2) + "\n")


def fold_mean(reward: RewardModel) -> None:
    """Move the mean that is subtracted into the weights, if possible; scores stay the same.

    The score is r - mean with r = w.h, where h comes from a norm. If the norm has a bias c
    (LayerNorm of GPT-2, GPT-NeoX), c' = c - mean w / |w|^2 gives it. Otherwise the mean stays in
    the settings: the head and an RMSNorm have no bias, an adapter's base must not change, and a
    bounded reward or one with a log-prob term is not the head's output only.
    """
    settings, head = reward.settings, score_head(reward.model)
    if settings.lm_coef or settings.bound is not None or has_adapter(reward.model):
        return
    weight = head.weight.detach()[0].double()  # (H,)
    norm = final_norm(reward.model)
    if norm is not None and weight.any():
        with torch.no_grad():
            norm.bias.sub_((settings.mean * weight / (weight @ weight)).to(norm.bias.dtype))
        reward.settings = replace(settings, mean=0.0)


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


def scored_template(settings: RewardSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """A chat template whose text is what the reward reads, up to the token that is scored.

    The tokenizer's own chat template may write more after the turn's end (ChatML a newline), where
    a classifier would read another score. Of the text after the prompt, this one keeps what is
    before EOS, the end of a run's texts, and writes EOS. With echo the prompt and EOS follow again.
    """
    plain = chat_template(settings, tokenizer, settings.echo)
    if plain is not None:
        return plain
    # Jinja leaves out one newline at the end; + keeps white space at the inner side of a tag.
    own = str(tokenizer.get_chat_template()).removesuffix("\n")
    macro = "{%- macro irl_chat(messages, add_generation_prompt) +%}" + own + "{%+ endmacro -%}"
    ended = _ENDED.replace("ECHO", "+ before + eos_token" if settings.echo else "")
    return macro + (_LOWERED if settings.lowercase else "") + ended
