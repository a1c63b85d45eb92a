"A training that is killed, interrupted, starved of disk or fed with poison: what is left is whole, and what is resumed gives the same numbers."
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from finetune_nb.core.files import BadInput, read_json, sha256_file, write_json
from finetune_nb.core.recipe import Recipe
from finetune_nb.core.run import Run
from finetune_nb.training import fit as fit_module
from finetune_nb.training import interrupt
from finetune_nb.training.checkpoints import COMPLETE, DiskFull, commit, resume_point, saved_steps, set_aside, why_not
from finetune_nb.training.fit import fit
from finetune_nb.training.objective import Answers
from finetune_nb.training.plan import make_plan
from finetune_nb.training.watchdog import STOPPED, Diverged

from conftest import cli

STEPS, KILLED = 10, 9
NAMES = 'adapter_model.safetensors', 'optimizer.pt', 'scheduler.pt', 'rng_state.pth', 'trainer_state.json', 'journal.json'


@pytest.fixture(autouse=True)
def one_quiet_core(monkeypatch):
    "Bit for bit is promised on a CPU; a forked child must find torch without threads of its own."
    monkeypatch.setattr(fit_module, 'pick_device', lambda *_: 'cpu')
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def bases(tiny_model, tmp_path_factory):
    "The tiny model's first layer, without dropout (rows are packed) and with it (a resume without the random state gives other losses)."
    from safetensors.torch import load_file, save_file
    def make(dropout: float) -> Path:
        folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp('base') / 'model')
        write_json(folder / 'config.json', read_json(folder / 'config.json') | {'attention_dropout': dropout, 'num_hidden_layers': 1})
        weights = {name: value for name, value in load_file(folder / 'model.safetensors').items() if '.layers.1.' not in name}
        save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
        return folder
    return {'packed': make(0.0), 'lora': make(0.1), 'full': make(0.1)}


def row(n: int) -> dict:
    return {'id': f'row-{n}', 'origin': {'file': 'mails.jsonl', 'line': n}, 'messages': [
        {'role': 'system', 'content': 'Answer with the number, as often as you are asked to.'}, {'role': 'user', 'content': f'Say {n} {n % 3 + 1} times.'},
        {'role': 'assistant', 'content': ' and '.join([str(n)] * (n % 3 + 1))}]}


@pytest.fixture(scope='module')
def planned(bases, tmp_path_factory):
    "Plans by kind: steps of four rows in two forward passes; at the seventh the rows come a second time."
    def plan(kind: str, **changes):
        base, approach = bases[kind], 'full' if kind == 'full' else 'lora'
        train = {'approach': approach, 'max_steps': STEPS, 'batch_size': 4, 'micro_batch_size': 2, 'learning_rate': 3e-3, 'evals': 4, 'validation_rows': 4,
                 'checkpoint_minutes': 1e-9, 'dtype': 'float32', 'panel_rows': 0, 'forgetting': {'rows': 0}} | changes
        recipe = Recipe(name='resume', data={'sources': [{'path': 'mails.jsonl'}]}, base_models=[str(base)], train=train)
        rows = SimpleNamespace(train=[row(n) for n in range(1, 25)], validation=[row(n) for n in range(25, 31)], test=[])
        return make_plan(Run(tmp_path_factory.mktemp('run'), recipe), rows, SimpleNamespace(base=str(base), advice={}))
    return plan


def told(folder: Path) -> dict:
    "All numbers of a training that must not depend on how often it was killed."
    last = saved_steps(folder / 'checkpoints')[0]
    known = read_json(last / 'journal.json')
    lines = [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]
    plain = lambda line: {k: v for k, v in line.items() if k != 'seconds'}
    return {'log': [plain(line) for line in lines], 'journal': [plain(line) for line in known['lines']], 'curve': known['curve'],
            'weights': {f.name: sha256_file(f) for f in last.glob('*.safetensors')}, 'kept': sorted(p.name for p in (folder / 'checkpoints').iterdir()
                                                                                                   if not p.name.startswith('.'))}


@pytest.fixture(scope='module')
def reference(planned, tmp_path_factory):
    "The same training, never interrupted, by kind."
    known = {}
    def of(kind: str) -> tuple:
        if kind not in known:
            folder, plan = tmp_path_factory.mktemp(kind), planned(kind)
            assert in_a_fork(lambda: fit(plan, folder)) == 0
            known[kind] = plan, folder, told(folder)
        return known[kind]
    return of


# Dying

def in_a_fork(work, tell: Path | None = None) -> int:
    "Do it in a child of this process; its exit status, negative for a signal."
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell starts what runs in its background with SIGINT ignored
        try:
            quiet = os.open(tell or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2): os.dup2(quiet, stream)
            sys.stdout, sys.stderr = os.fdopen(1, 'w', closefd=False), os.fdopen(2, 'w', closefd=False)
            work()
            code = 0
        except KeyboardInterrupt: code = 130
        except BaseException: traceback.print_exc()
        finally:
            with suppress(Exception): sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_in(seconds: float) -> None:
    "Be killed by the system after so much processor time, wherever one is then; nothing of Python runs any more."
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)


def die_at_operation(number: int, folder: Path) -> None:
    "Die at the n-th thing that is done to a file under a folder: opened for writing, forced to the disk, renamed, removed, or half-written."
    count = [0]
    def strike(path=None):
        count[0] += 1
        if count[0] < number: return
        if path: os.truncate(path, os.path.getsize(path) // 2)
        os._exit(KILLED)
    def heard(event, args):
        if event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+') or event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir'):
            if str(folder) in str(args[0]) or event in ('os.remove', 'os.rmdir'): strike()
    sys.addaudithook(heard)
    fsync = os.fsync
    os.fsync = lambda handle: (strike(), fsync(handle))[1]
    for module, name, place in ((torch, 'save', 1),):
        before = getattr(module, name)
        def after(*args, before=before, place=place, **kwargs):
            before(*args, **kwargs)
            if isinstance(args[place], (str, Path)): strike(args[place])
        setattr(module, name, after)


@pytest.mark.parametrize('kind, deaths', [('packed', 12), ('lora', 8), ('full', 10)])
def test_killed_at_random_moments(kind, deaths, reference, tmp_path):
    "Thirty deaths, half of them at a moment of the clock and half at an operation on a file; whenever a training gets through, its numbers are the same."
    plan, _, expected = reference(kind)
    rng, count, through, resumed = random.Random(kind), 0, 0, set()
    while count < deaths or not through:
        folder, moment = tmp_path / f'{through}', (rng.randint(1, 150), rng.uniform(0.05, 1.5))
        def live():
            if count < deaths: die_at_operation(moment[0], folder) if count % 2 else die_in(moment[1])
            fit(plan, folder)
        folder.mkdir(exist_ok=True)
        status = in_a_fork(live, tmp_path / 'said')
        said = (tmp_path / 'said').read_text(errors='replace')
        if 'resumed at step' in said: resumed.add(int(said.split('resumed at step ')[1].split()[0]))
        assert status in (0, KILLED, -signal.SIGPROF), said
        if status: count += 1
        else:
            assert told(folder) == expected
            through += 1
    assert resumed, 'no death came in the middle'


def test_without_the_random_state_the_numbers_differ(reference, tmp_path):
    "What the tests above would see if a resume began with other random numbers."
    plan, folder, expected = reference('lora')
    shutil.copytree(folder, tmp_path / 'again')
    shutil.rmtree(saved_steps(tmp_path / 'again/checkpoints')[0])
    def forgetful():
        fit_module.AnswerTrainer._load_rng_state = lambda *_: None
        fit(plan, tmp_path / 'again')
    assert in_a_fork(forgetful) == 0
    log = told(tmp_path / 'again')['log']
    assert log[:-1] == expected['log'][:-1] and log[-1]['loss'] != expected['log'][-1]['loss']


def whole(place: Path, text: str) -> Path:
    "A folder with everything in it."
    place.mkdir(parents=True)
    for name in NAMES: (place / name).write_text(text)
    return place


def test_death_at_every_operation_of_a_commit(tmp_path):
    "Over an older checkpoint and a damaged one of the same step: at each operation there is a whole one to go on from."
    for number in range(1, 200):
        folder = tmp_path / f'{number}'
        commit(whole(folder / '.writing-1/checkpoint-1', 'old'), folder, 1, 'stamp')
        commit(whole(folder / '.writing-1/checkpoint-2', 'before'), folder, 2, 'stamp')
        written = whole(folder / '.writing-2/checkpoint-2', 'after')
        def live():
            die_at_operation(number, folder)
            commit(written, folder, 2, 'stamp')
        status = in_a_fork(live)
        found = resume_point(folder, 'stamp')
        assert status in (0, KILLED) and found.step == 2 and not found.skipped
        assert {(found.path / name).read_text() for name in NAMES} < {'before', 'after'}
        if status == 0: break
        again = whole(folder / '.writing-3/checkpoint-2', 'again')
        assert why_not(commit(again, folder, 2, 'stamp'), 'stamp') == '' and (folder / 'step-000002/optimizer.pt').read_text() == 'again'
    assert number > 12, 'hardly an operation was seen'


# Damage

def flipped(file: Path) -> None:
    "One bit of a file is another."
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def unlisted(checkpoint: Path, name: str) -> None:
    "A file is gone, and the list does not know that it ever was."
    (checkpoint / name).unlink()
    listed = read_json(checkpoint / COMPLETE)
    del listed['files'][name]
    write_json(checkpoint / COMPLETE, listed)


FAULTS = {f'{name} {how}': (do, name, word) for name in NAMES for how, do, word in (
    ('missing', lambda c, n: (c / n).unlink(), f'{name} is missing'), ('never listed', unlisted, 'it holds no '),
    ('with a flipped bit', lambda c, n: flipped(c / n), f'{name} has changed'), ('cut short', lambda c, n: os.truncate(c / n, 10), f'{name} has 10 bytes'))}
FAULTS |= {'half-written': (lambda c, n: (c / n).unlink(), COMPLETE, 'is missing'), 'unreadable list': (lambda c, n: (c / n).write_text('{"step'), COMPLETE, 'damaged'),
           'binary list': (lambda c, n: (c / n).write_bytes(b'\xff\x00'), COMPLETE, 'damaged'),
           'other training': (lambda c, n: write_json(c / n, read_json(c / n) | {'stamp': 'x'}), COMPLETE, 'other rows, settings or base'),
           'other step': (lambda c, n: write_json(c / n, read_json(c / n) | {'step': 3}), COMPLETE, 'it holds step 3'),
           'foreign file': (lambda c, n: (c / n).write_text(''), 'optimizer.bin', 'was not there'),
           'empty': (lambda c, n: (shutil.rmtree(c), c.mkdir()), '', 'is missing')}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_damaged_checkpoint_is_passed_over(fault, reference, tmp_path, capsys):
    "The one before is used, the reason is said, and the damaged one is kept aside."
    plan, folder, _ = reference('lora')
    shutil.copytree(folder / 'checkpoints', tmp_path / 'checkpoints')
    newest, before = saved_steps(tmp_path / 'checkpoints')[:2]
    do, name, word = FAULTS[fault]
    do(newest, name)
    found = resume_point(tmp_path / 'checkpoints', plan.stamp)
    assert found.path == before and len(found.skipped) == 1
    said = capsys.readouterr().out
    assert f'checkpoint not used: {newest.name}' in said and word in said
    assert not newest.exists() and newest.with_name(f'.bad-{newest.name}').is_dir()


def test_trained_on_after_damage(reference, tmp_path):
    "The newest, which is the best, has a flipped bit: the numbers are those of an undamaged training."
    plan, folder, expected = reference('lora')
    shutil.copytree(folder, tmp_path / 'again')
    flipped(saved_steps(tmp_path / 'again/checkpoints')[0] / 'optimizer.pt')
    assert in_a_fork(lambda: fit(plan, tmp_path / 'again')) == 0
    assert told(tmp_path / 'again') == expected
    assert not list((tmp_path / 'again/checkpoints').glob('.bad-*'))


def test_another_number_of_processes_is_refused(reference, tmp_path):
    plan, folder, _ = reference('lora')
    with pytest.raises(BadInput, match='1 process.*this one has 2'): resume_point(folder / 'checkpoints', plan.stamp, ranks=2)


# Poison, signals and full disks come through the objective: it is asked in the middle of each step

class Events(Answers):
    "The loss of the answers; in a step, once, something happens."
    def __init__(self, plan, log: Path, step: int, event):
        super().__init__(plan.pad_id)
        self.log, self.step, self.event = log, step, event

    def loss(self, model, part, normaliser):
        loss = super().loss(model, part, normaliser)
        if not torch.is_grad_enabled() or not self.event or len(self.log.read_text().splitlines()) < self.step - 1: return loss
        event, self.event = self.event, None
        changed = event(loss)
        return loss if changed is None else changed


def with_event(plan, folder: Path, event, step: int = 8):
    "Train; in the first of a step's two forward passes the event happens."
    return fit(plan, folder, objective=lambda *_: Events(plan, folder / 'log.jsonl', step, event))


@pytest.mark.parametrize('factor, word', [(60.0, 'is usual'), (float('nan'), 'the loss is nan')])
def test_watchdog(factor, word, planned, tmp_path):
    "It stops before the step, names rows and rate, keeps the checkpoint before it, and a second attempt is told."
    plan = planned('lora', learning_rate=1e-3, max_steps=12)
    with pytest.raises(Diverged, match='step 12') as stopped: with_event(plan, tmp_path, lambda loss: loss * factor, step=12)
    said, rows = str(stopped.value), [plan.rows[i] for i in plan.steps[11]]
    assert word in said and 'learning rate' in said and 'train.learning_rate' in said and 'checkpoint of step 11 is kept' in said
    assert all(f'mails.jsonl:{one["origin"]["line"]} ({one["id"]}' in said for one in rows)
    assert [json.loads(line)['step'] for line in (tmp_path / 'log.jsonl').read_text().splitlines()] == list(range(1, 12))
    assert why_not(saved_steps(tmp_path / 'checkpoints')[0], plan.stamp) == '' and read_json(tmp_path / STOPPED)['step'] == 12
    with pytest.raises(BadInput, match='would be again: step 12'): fit(plan, tmp_path)


@pytest.mark.parametrize('number, status', [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_asked_to_stop(number, status, reference, tmp_path):
    "The step is finished and saved, the process ends as it would have, and what follows is the same training."
    plan, _, expected = reference('lora')
    assert in_a_fork(lambda: with_event(plan, tmp_path, lambda loss: os.kill(os.getpid(), number)), tmp_path / 'said') == status
    assert 'stopping after this step' in (tmp_path / 'said').read_text(errors='replace')
    assert saved_steps(tmp_path / 'checkpoints')[0].name == 'step-000008'
    assert not list((tmp_path / 'checkpoints').glob('.writing-*/*'))
    assert in_a_fork(lambda: fit(plan, tmp_path)) == 0
    assert told(tmp_path) == expected


def test_asked_twice(reference, tmp_path):
    "The second signal does not wait for the step; the checkpoint before it stands."
    plan, _, expected = reference('lora')
    def twice(loss):
        interrupt.ONE_WISH = 0
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT)
    assert in_a_fork(lambda: with_event(plan, tmp_path, twice)) == 130
    assert saved_steps(tmp_path / 'checkpoints')[0].name == 'step-000007'
    assert in_a_fork(lambda: fit(plan, tmp_path)) == 0
    assert told(tmp_path) == expected


@pytest.mark.parametrize('limit', [2000, 300_000])   # of a file, in bytes: hardly anything fits, or all but the optimiser
def test_disk_full(limit, reference, tmp_path):
    "The system refuses to write: the last checkpoint stays, nothing half-written does, and after making room it is the same training."
    plan, _, expected = reference('lora')
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(DiskFull, match='step-000007.* is whole; make room, then go on with --resume'):
        try: with_event(plan, tmp_path, lambda loss: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most[1])))
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert why_not(saved_steps(tmp_path / 'checkpoints')[0], plan.stamp) == ''
    assert not list((tmp_path / 'checkpoints').glob('.writing-*/*'))
    for line in (tmp_path / 'log.jsonl').read_text().splitlines(): json.loads(line)
    assert in_a_fork(lambda: fit(plan, tmp_path)) == 0
    assert told(tmp_path) == expected


def test_room_is_looked_at_first(planned, tmp_path, monkeypatch):
    "Nothing is written where it will not fit."
    plan, real = planned('lora'), shutil.disk_usage
    little = lambda loss: monkeypatch.setattr(shutil, 'disk_usage', lambda path: real(path)._replace(free=1_500_000))
    with pytest.raises(DiskFull, match='needs .* MB, 1.5 MB are free'): with_event(plan, tmp_path, little)
    assert saved_steps(tmp_path / 'checkpoints')[0].name == 'step-000007'


def test_a_torn_log_is_mended(reference, tmp_path):
    "A line that the crash cut off, and steps that no checkpoint knows, are not there twice."
    plan, folder, expected = reference('lora')
    shutil.copytree(folder, tmp_path / 'again')
    set_aside(saved_steps(tmp_path / 'again/checkpoints')[0])
    shutil.rmtree(next((tmp_path / 'again/checkpoints').glob('.bad-*')))
    with open(tmp_path / 'again/log.jsonl', 'a') as log: log.write('{"step": 11, "lo')
    assert in_a_fork(lambda: fit(plan, tmp_path / 'again')) == 0
    assert told(tmp_path / 'again')['log'] == expected['log']


class EverWorse(Answers):
    "Each validation loss is above the one before."
    worse = 1.0
    def loss(self, model, part, normaliser):
        if not torch.is_grad_enabled(): EverWorse.worse *= 1.5
        return super().loss(model, part, normaliser) * (1.0 if torch.is_grad_enabled() else self.worse)


def test_stopped_early_stays_stopped(planned, tmp_path):
    "Validation gets worse from the start: the training ends after the third look, and a resume does not go on."
    plan = planned('lora', evals=5, patience=2)
    first = fit(plan, tmp_path, objective=lambda *_: EverWorse(plan.pad_id))
    steps = [line['step'] for line in first.journal.lines]
    assert len(steps) < STEPS and first.journal.since_best == 2
    assert [line['step'] for line in fit(plan, tmp_path).journal.lines] == steps


# The long versions

@pytest.mark.slow
def test_a_run_stopped_by_sigterm_goes_on(recipe_of, tmp_path):
    "The runner hands its SIGTERM to the kernel, whose training ends with a checkpoint of its last step."
    recipe = recipe_of(tmp_path, train__max_steps=300, train__evals=2, train__checkpoint_minutes=60)
    words = [str(Path(sys.executable).with_name('finetune-nb')), 'run', str(recipe), '--name', 'stopped', '--reports', str(tmp_path / 'reports')]
    run = tmp_path / 'reports' / 'stopped'
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    log, deadline = run / 'training/log.jsonl', time.time() + 240
    while time.time() < deadline and process.poll() is None and not (log.is_file() and len(log.read_text().splitlines()) > 20): time.sleep(0.2)
    process.terminate()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and '--resume' in said, said
    steps = len(log.read_text().splitlines())
    assert saved_steps(run / 'training/checkpoints')[0].name == f'step-{steps:06d}', 'the last step was not saved'
    done = cli('run', '--resume', 'stopped', '--reports', tmp_path / 'reports', '--to', 'training')
    assert done.returncode == 0, done.stdout + done.stderr
    assert [json.loads(line)['step'] for line in log.read_text().splitlines()] == list(range(1, 301))


@pytest.mark.slow
def test_a_notebooks_stop_button(planned, tmp_path):
    "A kernel's training, interrupted: KeyboardInterrupt in the cell, a checkpoint of the last step, and the kernel lives on."
    from jupyter_client.manager import start_new_kernel
    import pickle
    (tmp_path / 'plan').write_bytes(pickle.dumps(planned('lora', max_steps=2000, evals=1, checkpoint_minutes=60)))
    manager, client = start_new_kernel(kernel_name='python3')
    try:
        client.execute(f'import pickle, torch\ntorch.set_num_threads(1)\nfrom pathlib import Path\nfrom finetune_nb.training.fit import fit\n'
                       f'fit(pickle.loads(Path({str(tmp_path / "plan")!r}).read_bytes()), Path({str(tmp_path)!r}))')
        log, deadline = tmp_path / 'log.jsonl', time.time() + 120
        while time.time() < deadline and not (log.is_file() and len(log.read_text().splitlines()) > 5): time.sleep(0.1)
        manager.interrupt_kernel()
        reply = client.get_shell_msg(timeout=60)
        while reply['msg_type'] != 'execute_reply': reply = client.get_shell_msg(timeout=60)
        assert reply['content']['ename'] == 'KeyboardInterrupt'
        assert saved_steps(tmp_path / 'checkpoints')[0].name == f'step-{len(log.read_text().splitlines()):06d}'
        assert client.execute_interactive('print(1)', timeout=30)['content']['status'] == 'ok'
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_killed_thirty_times_from_outside(recipe_of, tmp_path):
    "Whole runs in processes of their own, killed by SIGKILL at random times, against one that was not."
    recipe = recipe_of(tmp_path, train__max_steps=60, train__evals=6, train__micro_batch_size=2, train__checkpoint_minutes=1e-9)
    assert cli('run', recipe, '--name', 'whole', '--reports', tmp_path / 'reports', '--to', 'training').returncode == 0
    assert cli('run', recipe, '--name', 'killed', '--reports', tmp_path / 'reports', '--to', 'selection').returncode == 0
    words = [str(Path(sys.executable).with_name('finetune-nb')), 'run', '--resume', 'killed', '--reports', str(tmp_path / 'reports'), '--to', 'training']
    rng, run = random.Random(4), tmp_path / 'reports' / 'killed'
    for _ in range(30):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        with suppress(subprocess.TimeoutExpired): process.wait(timeout=rng.uniform(1, 25))
        if process.poll() is not None: break
        kernels = [int(p.name) for p in Path('/proc').iterdir() if p.name.isdigit() and _of(p, run)]
        for pid in [process.pid, *kernels]:
            with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.5)
    done = cli(*words[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [[{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in (tmp_path / f'reports/{name}/training/log.jsonl').read_text().splitlines()]
            for name in ('whole', 'killed')]
    assert logs[0] == logs[1]


def _of(process: Path, run: Path) -> bool:
    "Whether a process is a kernel of a run."
    with suppress(OSError): return os.path.realpath(process / 'cwd').startswith(str(run)) and b'ipykernel_launcher' in (process / 'cmdline').read_bytes()
    return False
