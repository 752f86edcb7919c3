"""How to load what was exported, as code; the tests run it."""

from __future__ import annotations

from irl_align.hub.facts import Facts
from irl_align.reward.settings import RewardSettings

Snippet = tuple[str, str, str]
"""Title, language, code."""

_CHAT = """\
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
"""


def reward_snippets(settings: RewardSettings, plain: bool) -> list[Snippet]:
    """Ways to load a reward; `plain`: transformers alone gives its scores up to a constant."""
    ours = (
        "With irl-align, which applies the template itself:",
        "python",
        "from irl_align import RewardModel\n\n"
        "reward = RewardModel.from_pretrained(REPO)\n"
        "scores = reward.score([prompt], [answer])\n",
    )
    if not plain:
        return [ours]
    offset = ' - model.config.irl_reward["mean"]' if settings.mean else ""
    transformers = (
        "With transformers:",
        "python",
        "import torch\n"
        "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(REPO)\n"
        "model = AutoModelForSequenceClassification.from_pretrained(REPO).eval()\n\n\n"
        f"def score(prompt, answer):\n{_CHAT}"
        "    with torch.no_grad():\n"
        f"        return model(**inputs).logits[0, 0].item(){offset}\n",
    )
    mean = f', "logit_mean": {settings.mean!r}' if settings.mean else ""
    vllm = (
        "With vLLM (0.23 or newer for `logit_mean`); `/classify` gives the score as it is:",
        "sh",
        f"vllm serve REPO --runner pooling --convert classify \\\n"
        f"  --pooler-config '{{\"use_activation\": false{mean}}}'\n",
    )
    trl = (
        "As a reward function of TRL, on conversational prompts (the constant cancels in the "
        "advantages), or as the start of TRL's RewardTrainer:",
        "python",
        "from trl import GRPOTrainer, RewardTrainer\n\n"
        "trainer = GRPOTrainer(policy, reward_funcs=REPO, train_dataset=prompts, args=args)\n",
    )
    return [transformers, ours, trl, vllm]


def policy_snippets(facts: Facts) -> list[Snippet]:
    """Ways to load a policy."""
    longest = facts.view.recipe["generation"]["max_new_tokens"]
    return [
        (
            "With transformers:",
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            "tokenizer = AutoTokenizer.from_pretrained(REPO)\n"
            "model = AutoModelForCausalLM.from_pretrained(REPO)\n"
            'chat = [{"role": "user", "content": prompt}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
            ")\n"
            f"output = model.generate(**inputs, do_sample=True, max_new_tokens={longest})\n"
            'answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], '
            "skip_special_tokens=True)\n",
        ),
        (
            "With irl-align:",
            "sh",
            "irl-align generate REPO --input prompts.jsonl\n",
        ),
    ]


def adapter_snippets(what: str, mean: float = 0.0) -> list[Snippet]:
    """How to load an adapter, of a reward (whose constant is `mean`) or of a policy."""
    reward = what == "reward"
    loader = "AutoPeftModelFor" + ("SequenceClassification" if reward else "CausalLM")
    labels = ", num_labels=1" if reward else ""
    code = (
        f"from peft import {loader}\n"
        "from transformers import AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(REPO)\n"
        f"model = {loader}.from_pretrained(REPO{labels}).eval()\n"
    )
    if reward:
        offset = f" - {mean!r}" if mean else ""
        code = "import torch\n" + code
        code += (
            "model.config.pad_token_id = tokenizer.pad_token_id\n\n\n"
            f"def score(prompt, answer):\n{_CHAT}"
            "    with torch.no_grad():\n"
            f"        return model(**inputs).logits[0, 0].item(){offset}\n"
        )
    return [("An adapter (LoRA): with peft, which loads the base model too:", "python", code)]
