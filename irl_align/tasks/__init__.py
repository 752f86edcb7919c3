"""Tasks whose answers can be checked: a built-in one and the E2E NLG challenge.

A task provides a gold metric (:class:`irl_align.tasks.gold.GoldMetric`) and a prompt edit
(:data:`irl_align.tasks.gold.PromptEdit`), both named by import path, for example
``irl_align.tasks.e2e:gold`` and ``irl_align.tasks.e2e:edit``.
"""
