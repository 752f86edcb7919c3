"""Encoded demonstrations of one to two letters, for tests of pairs."""

from hypothesis import strategies as st

from irl_align.data.rows import prompt_key

EOS = 2


def demo(prompt: str, *tokens: int) -> dict[str, object]:
    """A demonstration whose prompt ids are its letters."""
    return {
        "prompt": prompt,
        "prompt_key": prompt_key(prompt),
        "prompt_ids": [ord(letter) for letter in prompt],
        "completion_ids": [*tokens, EOS],
    }


tokens = st.integers(10, 13)
demonstrations = st.lists(
    st.builds(demo, st.sampled_from(["a", "b", "ab"]), tokens, tokens), min_size=1, max_size=12
)
