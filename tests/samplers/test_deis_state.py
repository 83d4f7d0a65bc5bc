"""What DEISScheduler remembers from step to step: enough for any loop, and nothing beyond the generation."""

import copy
import pickle
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ptq4dm.errors import UserError
from ptq4dm.samplers import DDIMScheduler, DEISScheduler, FittedScheduler

SCHEDULERS = {
    "t_ab": {"solver": "t_ab", "order": 3},
    "t_ab corrected": {"solver": "t_ab", "order": 2, "corrector": True},
    "rho_ab": {"solver": "rho_ab", "order": 2},
    "ipndm": {"solver": "ipndm", "order": 3},
    "log_rho": {"solver": "log_rho", "order": 2},
    "2heun": {"solver": "rho_rk", "rk_method": "2heun"},
    "4rk": {"solver": "rho_rk", "rk_method": "4rk"},
}


@pytest.fixture(params=SCHEDULERS)
def scheduler(request):
    """One of each kind, with 6 steps set."""
    scheduler = DEISScheduler(**SCHEDULERS[request.param])
    scheduler.set_timesteps(6)
    return scheduler


def model(x, t):
    return torch.sin(1.5 * x + 0.003 * float(t)) + 0.3 * x


def noise(seed=0, shape=(2, 3)):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def advance(scheduler, x, times):
    for t in times:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


def alone(scheduler, x, times=None):
    """The same generation on a new scheduler that does nothing else."""
    other = DEISScheduler.from_config(scheduler.config)
    other.set_timesteps(6)
    return advance(other, x, other.timesteps if times is None else times)


# ---- several generations with one scheduler, without set_timesteps in between


def test_in_turn(scheduler):
    for seed in (0, 1):
        assert torch.equal(advance(scheduler, noise(seed), scheduler.timesteps), alone(scheduler, noise(seed)))


@pytest.mark.parametrize("other_shape", [(2, 3), (5, 3), (2, 3, 4, 4)])
def test_interleaved(scheduler, other_shape):
    x, y = noise(0), noise(1, other_shape)
    for t in scheduler.timesteps:
        x = advance(scheduler, x, [t])
        y = advance(scheduler, y, [t])
    assert torch.equal(x, alone(scheduler, noise(0))) and torch.equal(y, alone(scheduler, noise(1, other_shape)))


def test_one_some_steps_behind_the_other(scheduler):
    times, lag = scheduler.timesteps, 2
    x = advance(scheduler, noise(0), times[:lag])
    y = noise(1)
    for behind, ahead in zip(times, times[lag:], strict=False):
        x = advance(scheduler, x, [ahead])
        y = advance(scheduler, y, [behind])
    y = advance(scheduler, y, times[-lag:])
    assert torch.equal(x, alone(scheduler, noise(0))) and torch.equal(y, alone(scheduler, noise(1)))


def test_after_an_aborted_one(scheduler):
    for stop in range(1, len(scheduler.timesteps)):
        advance(scheduler, noise(1), scheduler.timesteps[:stop])
        assert torch.equal(advance(scheduler, noise(0), scheduler.timesteps), alone(scheduler, noise(0)))


def test_a_later_start_after_one_of_another_shape_stopped_there(scheduler):
    start = 2 * scheduler.order
    advance(scheduler, noise(1, (5, 3)), scheduler.timesteps[:start])
    x = advance(scheduler, noise(0), scheduler.timesteps[start:])
    assert torch.equal(x, alone(scheduler, noise(0), scheduler.timesteps[start:].tolist()))


def test_a_step_taken_twice(scheduler):
    x = advance(scheduler, noise(), scheduler.timesteps[:3])
    first = advance(scheduler, x, scheduler.timesteps[3:])
    assert torch.equal(first, advance(scheduler, x, scheduler.timesteps[3:]))


# ---- loops that hand back another tensor, or write over the one they got


def test_a_pipeline_may_replace_the_sample(scheduler):
    """Inpainting does: the latest evaluations are used. Here the replacement is equal."""
    x = noise()
    for t in scheduler.timesteps:
        x = advance(scheduler, x, [t]).clone()
    assert torch.equal(x, alone(scheduler, noise()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_static_buffers(scheduler, kind):
    """One tensor for every sample and one for every output, as in a loop over a CUDA graph."""
    config = {**scheduler.config, "prediction_type": kind}
    scheduler = DEISScheduler.from_config(config)
    scheduler.set_timesteps(6)
    expected = alone(scheduler, noise())
    x, output = noise(), torch.empty(2, 3)
    for t in scheduler.timesteps:
        output.copy_(model(x, t))
        x.copy_(scheduler.step(output, t, x).prev_sample)
    assert torch.equal(x, expected)


# ---- starting in the middle


def test_sliced_timesteps(scheduler):
    """The first steps then have lower order, as after pure noise."""
    start = 2 * scheduler.order
    x = advance(scheduler, noise(), scheduler.timesteps[start:])
    assert torch.equal(x, alone(scheduler, noise(), scheduler.timesteps[start:].tolist()))
    scheduler.timesteps = scheduler.timesteps[start:]
    assert torch.equal(x, advance(scheduler, noise(), scheduler.timesteps))


def test_the_first_step_of_a_later_start_is_ddim():
    scheduler = DEISScheduler(solver="t_ab", order=3)
    ddim = DEISScheduler(solver="t_ab", order=0)
    for s in (scheduler, ddim):
        s.set_timesteps(6)
    first, second = scheduler.timesteps[2:4]
    x = advance(scheduler, noise(), [first])
    assert torch.equal(x, advance(ddim, noise(), [first]))
    y = advance(ddim, x, [second])
    assert not torch.allclose(advance(scheduler, x, [second]), y, rtol=1e-3)


def test_begin_index_decides_where_a_time_not_in_the_grid_belongs():
    scheduler = DEISScheduler(solver="rho_ab", timestep_grid="linear")
    scheduler.set_timesteps(10)
    times = scheduler.timesteps.tolist()
    foreign = times[4] + 1
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3
    x = scheduler.step(model(noise(), foreign), foreign, noise()).prev_sample
    assert torch.equal(x, scheduler.step(model(noise(), foreign), scheduler.timesteps[3], noise()).prev_sample)
    scheduler.set_timesteps(10)
    assert scheduler.begin_index is None
    x = scheduler.step(model(noise(), foreign), foreign, noise()).prev_sample  # the nearest
    assert torch.equal(x, scheduler.step(model(noise(), foreign), scheduler.timesteps[4], noise()).prev_sample)


def test_a_runge_kutta_step_cannot_be_entered_in_its_middle():
    scheduler = DEISScheduler(solver="rho_rk", rk_method="3kutta")
    scheduler.set_timesteps(4)
    with pytest.raises(UserError, match="inside a Runge-Kutta step"):
        advance(scheduler, noise(), scheduler.timesteps[1:])
    with pytest.raises(UserError, match="inside a Runge-Kutta step"):
        advance(scheduler, noise(), scheduler.timesteps[4:].tolist())


# ---- forms of a timestep


@pytest.mark.parametrize(
    "form",
    [float, lambda t: t.clone(), lambda t: t.reshape(1), lambda t: t.clone().reshape(1), lambda t: t.expand(2)],
    ids=["number", "copy", "view [1]", "copy [1]", "view [2]"],
)
def test_any_form_of_timestep(scheduler, form):
    """Numbers and copies too, though 2heun has each time twice: at the end of one step and the start of the next."""
    x = noise()
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), form(t), x).prev_sample
    assert torch.equal(x, alone(scheduler, noise()))


def test_a_number_starts_a_step_where_two_evaluations_share_a_time():
    scheduler = DEISScheduler(solver="rho_rk", rk_method="2heun")
    scheduler.set_timesteps(4)
    times = scheduler.timesteps.tolist()
    assert times[3] == times[4]
    assert torch.equal(advance(scheduler, noise(), times[4:]), advance(scheduler, noise(), scheduler.timesteps[4:]))


class NoReadBack(TorchDispatchMode):
    """Fails on what would make a GPU wait: the value of a tensor asked for by the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a value was read back"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [*SCHEDULERS.values(), None], ids=[*SCHEDULERS, "ddim"])
@pytest.mark.parametrize("first", [0, 4])
def test_nothing_is_read_back(options, first):
    scheduler = DDIMScheduler() if options is None else DEISScheduler(**options)
    scheduler.set_timesteps(6)
    x = noise()
    with pytest.raises(AssertionError), NoReadBack():
        float(x[0, 0])
    with NoReadBack():
        for t in scheduler.timesteps[first:]:
            x = scheduler.step(torch.sin(x), t, x).prev_sample


# ---- memory


def test_nothing_is_kept_after_the_last_step(scheduler):
    alive, x = [], noise()
    for t in scheduler.timesteps:
        output = model(x, t)
        x = scheduler.step(output, t, x).prev_sample
        alive += [weakref.ref(output), weakref.ref(x)]
    del x, output
    assert not any(ref() is not None for ref in alive)
    assert scheduler._latest is None and len(scheduler._states) == 0


def test_no_more_is_kept_than_the_next_steps_need(scheduler):
    """A long generation: at most the evaluations that the order asks for, and the start of a Runge-Kutta step."""
    scheduler.set_timesteps(40)
    x = noise()
    for t in scheduler.timesteps:
        x = advance(scheduler, x, [t])
        assert len(scheduler._states) <= 1
        states = [scheduler._latest] if scheduler._latest else []
        assert sum(len(s.history) + (s.base is not None) for s in states) <= 4


def test_set_timesteps_forgets_an_aborted_generation(scheduler):
    x = advance(scheduler, noise(), scheduler.timesteps[:3])
    scheduler.set_timesteps(6)
    assert scheduler._latest is None and len(scheduler._states) == 0
    assert x.isfinite().all()


# ---- copies


def test_deepcopy_between_steps(scheduler):
    """Both go on by themselves, also with the other's timesteps."""
    x = advance(scheduler, noise(), scheduler.timesteps[:3])
    twin = copy.deepcopy(scheduler)
    assert torch.equal(advance(twin, x, scheduler.timesteps[3:]), alone(scheduler, noise()))
    assert torch.equal(advance(scheduler, x, scheduler.timesteps[3:]), alone(scheduler, noise()))
    twin = copy.deepcopy(scheduler)
    assert torch.equal(advance(twin, noise(), twin.timesteps), alone(scheduler, noise()))


def test_pickle(scheduler):
    x = advance(scheduler, noise(), scheduler.timesteps[:3])
    twin = pickle.loads(pickle.dumps(scheduler))
    assert torch.equal(advance(twin, noise(), twin.timesteps), alone(scheduler, noise()))
    assert x.isfinite().all()


@pytest.mark.parametrize("whole", [False, True], ids=["model", "model and step"])
def test_torch_compile(whole):
    scheduler = DEISScheduler(solver="t_ab")
    scheduler.set_timesteps(5)

    def denoise(x, t):
        return torch.sin(1.5 * x + 0.003 * t)

    def step(x, t, predict=denoise):
        return scheduler.step(predict(x, t), t, x).prev_sample

    compiled = torch.compile(step if whole else denoise, backend="eager")
    x = y = noise()
    for t in scheduler.timesteps:
        x = step(x, t)
    for t in scheduler.timesteps:
        y = compiled(y, t) if whole else step(y, t, compiled)
    assert torch.equal(x, y)


def test_step_needs_set_timesteps_first():
    for new in (DEISScheduler(), DDIMScheduler()):
        with pytest.raises(UserError, match="call set_timesteps"):
            new.step(noise(), 999, noise())


def test_an_output_of_another_shape(scheduler):
    with pytest.raises(UserError, match=r"\(1, 9, 4, 4\), the sample \(1, 3, 4, 4\).*learned variance"):
        scheduler.step(torch.zeros(1, 9, 4, 4), scheduler.timesteps[0], torch.zeros(1, 3, 4, 4))


TABLES = {
    "3": {"timesteps": [900, 500, 100], "scale": [1.0, 0.9, 0.8], "weights": [[-0.1], [-0.2, 0.1], [-0.3, 0.2]]}
}


@pytest.mark.parametrize("make", [DEISScheduler, DDIMScheduler, lambda: FittedScheduler(tables=TABLES)])
def test_one_time_for_all_samples(make):
    """As one number a sample, expanded, it is that; several are told."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for batched in (False, True):
        scheduler = make()
        scheduler.set_timesteps(3)
        t = scheduler.timesteps[0]
        results.append(scheduler.step(x, t.expand(2) if batched else t, x).prev_sample)
    assert torch.equal(*results)
    for several in (t.repeat(2), scheduler.timesteps[:2], torch.empty(0)):
        with pytest.raises(UserError, match="step moves all samples at one time: give it one timestep, not"):
            scheduler.step(x, several, x)


def test_a_fitted_schedule_takes_its_first_time_or_the_next_alone():
    """A number is taken for the nearest: what a copy in bfloat16 is rounded to."""
    scheduler, x = FittedScheduler(tables=TABLES), torch.zeros(1, 3, 4, 4)
    scheduler.set_timesteps(3)
    with pytest.raises(UserError, match="begins at its first timestep"):
        scheduler.step(x, 123.4, x)
    x = scheduler.step(x, 904.0, x).prev_sample
    with pytest.raises(UserError, match="begins at its first timestep"):
        scheduler.step(x, 100, x)
    x = scheduler.step(x, torch.tensor(496.0), x).prev_sample
    x = scheduler.step(x, 100, x).prev_sample
    with pytest.raises(UserError, match="begins at its first timestep"):
        scheduler.step(x, 123.4, x)  # after a finished generation, too


@pytest.mark.parametrize("make", [DEISScheduler, DDIMScheduler, lambda: FittedScheduler(tables=TABLES)])
def test_bounds_that_nobody_means_are_not_told(make):
    with pytest.raises(UserError, match="must be a whole number of at most 1000000; got 2.5"):
        make().set_timesteps(2.5)


def test_a_nan_in_a_table_is_shown():
    for name, value in (("scale", [1.0, 0.9, float("nan")]), ("weights", [[-0.1], [float("-inf"), 0.1], [0.2, 0.1]])):
        with pytest.raises(UserError, match=f"{name} must be .*, not NaN or infinity; got .*(nan|-inf)"):
            FittedScheduler(tables={"3": {**TABLES["3"], name: value}})
