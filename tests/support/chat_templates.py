"""Chat templates of the families that users bring, each with a tiny tokenizer and its stop ids."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from support.tiny_tokenizers import tiny_tokenizer


@dataclass(frozen=True)
class ChatFamily:
    """A family of instruct models: what its tokenizer and its generation config say."""

    template: str
    special: tuple[str, ...]
    """Special tokens."""
    eos: str
    """The tokenizer's EOS, which is not always the end of a turn."""
    pad: str | None
    bos: str | None
    end: str
    """The token that ends a text in this template."""
    after: str
    """What the template writes after it."""
    stops: tuple[str, ...]
    """Tokens of eos_token_id in the generation config."""

    def stop_ids(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Ids of `stops`."""
        return [tokenizer.convert_tokens_to_ids(token) for token in self.stops]


_GENERATION = "{% if add_generation_prompt %}"
FAMILIES = {
    "llama-3": ChatFamily(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
        "{{ '\n\n' }}{{ m.content | trim }}<|eot_id|>{% endfor %}"
        + _GENERATION
        + "<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}",
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
        eos="<|end_of_text|>",
        pad=None,
        bos="<|begin_of_text|>",
        end="<|eot_id|>",
        after="",
        stops=("<|end_of_text|>", "<|eot_id|>"),
    ),
    "chatml": ChatFamily(
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ '\n' }}{{ m.content }}<|im_end|>"
        "{{ '\n' }}{% endfor %}" + _GENERATION + "<|im_start|>assistant{{ '\n' }}{% endif %}",
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|im_end|>",
        pad="<|endoftext|>",
        bos=None,
        end="<|im_end|>",
        after="\n",
        stops=("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma": ChatFamily(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}{{ '\n' }}{{ m.content | trim }}"
        "<end_of_turn>{{ '\n' }}{% endfor %}"
        + _GENERATION
        + "<start_of_turn>model{{ '\n' }}{% endif %}",
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        pad="<pad>",
        bos="<bos>",
        end="<end_of_turn>",
        after="\n",
        stops=("<eos>", "<end_of_turn>"),
    ),
    "mistral": ChatFamily(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        pad=None,
        bos="<s>",
        end="</s>",
        after="",
        stops=("</s>",),
    ),
    "phi": ChatFamily(
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{{ m.content }}<|end|>{{ '\n' }}"
        "{% endfor %}"
        + _GENERATION
        + "<|assistant|>{{ '\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<unk>", "<s>", "</s>", "<|endoftext|>", "<|assistant|>", "<|end|>", "<|user|>"),
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        bos="<s>",
        end="<|end|>",
        after="\n<|end|>",  # eos_token, once it is the end
        stops=("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "zephyr": ChatFamily(
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{{ m.content + eos_token }}{{ '\n' }}"
        "{% endfor %}" + _GENERATION + "<|assistant|>{{ '\n' }}{% endif %}",
        ("<unk>", "<s>", "</s>"),
        eos="</s>",
        pad="</s>",
        bos="<s>",
        end="</s>",
        after="\n",
        stops=("</s>",),
    ),
}
"""Families by name, with the features that differ between them in the published models."""


def chat_tokenizer(family: str, kind: str = "byte-level") -> PreTrainedTokenizerFast:
    """A tokenizer of a family, as its publisher saves it; kind: of tiny_tokenizers.FAMILIES."""
    own = FAMILIES[family]
    return tiny_tokenizer(
        kind,
        own.special,
        eos=own.eos,
        pad=own.pad,
        bos=own.bos,
        template=own.template,
        prefix=family != "gemma",
    )
