"""TRACE and its baselines: Stage 1, Stage 2, posteriors of prompts, credit. docs/METHOD.md is the way through it.

    registry    names of rules → classes, and what each rule says of itself
    stage1/     which prompts get root rollouts         stage2/   which prefixes are continued
    credit/     what each turn of a finished tree gets  objective/  what a token gains by its ratio
    aggregation by what a batch's loss is divided       posterior   what is believed of a prompt
    allocation  the exact solvers (`allocate_roots`, `allocate_prefixes`), on knapsack

May import the vocabulary and `trees`; numpy and scipy only, so no model, no engine and no Ray. `trace_async.config`
asks the registry for names, so nothing here may import `trace_async.config`.
"""
