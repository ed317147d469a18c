"""Does growing pay, at equal cost? Arms paired by random seed: the same data, batches, schedule family and boundaries.

    python -m benchmarks.growth --quick --json F     one task, five seeds; at most 20 minutes on 2 cores
    python -m benchmarks.growth --json F             every task and arm; hours, and it goes on where it was stopped
    python -m benchmarks.growth --tune TASK          the learning rates of each family, on the validation split
    python -m benchmarks.growth --report             tables and plots in docs/ from the results that are there

| file | what |
|---|---|
| `tasks` | what is trained, with the tuned settings and the margins that were fixed beforehand |
| `arms` | what is compared, and at which cost |
| `runs` | one run; its identity is the code that decides it and its settings |
| `study` | who runs what in which order; results as they come |
| `peers` | growing by GradMax and by an identity morph |
| `search` | what a user would pick instead: ASHA, and a grid |
| `tune` | the same small budget of trials for each family |
| `figures`, `bars` | means, intervals, frontiers, and what was promised |
| `report` | docs/results.md |
"""
