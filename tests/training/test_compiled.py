"""Programs compiled ahead, once for each shape."""

import chex
import jax
import numpy as np
from training.test_loop import DATA, METHOD, MODEL, OPTIMIZER, SCHEDULE, examples, started

from jpeft.data import batching
from jpeft.training import loop
from jpeft.training import step as stepping
from jpeft.training.compiled import Steps, prepare


def test_prepared_programs_are_all_that_a_run_needs():
    start = started()
    epochs = [batching.train_batches(DATA.train, DATA.layouts, SCHEDULE.seed, epoch) for epoch in (1, 2, 3)]
    assert {len(parts) for batches in epochs for parts in batches} == {1, 2}  # it needs the programs of both layouts
    train = chex.assert_max_traces(stepping.train_step(MODEL, METHOD, OPTIMIZER), n=2)
    steps = Steps.compiled(train, chex.assert_max_traces(stepping.eval_step(MODEL, METHOD), n=2))
    chex.clear_trace_counter()
    prepare(steps, *start, DATA, SCHEDULE.key)
    spent = steps.train.seconds, steps.eval.seconds
    assert min(spent) > 0
    state = jax.tree.map(jax.numpy.array, start[0])  # its buffers are given up
    list(loop.fit(steps, state, start[1], DATA, SCHEDULE))
    assert (steps.train.seconds, steps.eval.seconds) == spent


def test_each_shape_compiles_once_and_is_timed():
    counted = chex.assert_max_traces(lambda trainable, frozen, batch: batch.labels + trainable, n=2)
    steps = Steps.compiled(lambda state, frozen, batch, key: (state, 0), counted)
    chex.clear_trace_counter()
    for length in (8, 16, 8, 16):
        rows = examples(8)._replace(input_ids=tuple(np.ones(length, np.int32) for _ in range(8)))
        rows = rows._replace(token_type_ids=rows.input_ids)
        loop.evaluate(lambda *args: np.asarray(steps.eval(*args))[:, None], np.int32(1), {}, rows, (length,), 8)
    assert steps.eval.seconds > 0
    assert steps.train.seconds == 0
