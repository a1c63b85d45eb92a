"""The step: the loss and the gradients of transformers' own padded forward, for every family, approach and wrapper."""
import copy
import os
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_nb.model.adapters import accelerate_adapters
from finetune_nb.model.layout import lay_out
from finetune_nb.model.step import TESTED, answer_loss, answer_scores, token_losses, why_padded

SIZES = dict(vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    'llama': {}, 'qwen2': {}, 'qwen3': {'head_dim': 16}, 'phi3': {}, 'gemma': {'head_dim': 16}, 'olmo2': {}, 'smollm3': {}, 'starcoder2': {},
    'mistral': {'sliding_window': 128}, 'granite': {'logits_scaling': 3.0, 'residual_multiplier': 0.5}, 'phi': {},
    'gpt2': {'n_embd': 48, 'n_layer': 2, 'n_head': 6, 'n_positions': 256, 'resid_pdrop': 0.0, 'embd_pdrop': 0.0, 'attn_pdrop': 0.0},
    'opt': {'ffn_dim': 80, 'word_embed_proj_dim': 48, 'dropout': 0.0}, 'gpt_neox': {'hidden_dropout': 0.0, 'attention_dropout': 0.0},
}


def made(family, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **more})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


def batch_of(rows, answers):
    "Rows as ids; `answers`: for each row the spans that are trained."
    labels = [torch.full_like(row, -100) for row in rows]
    for label, row, spans in zip(labels, rows, answers):
        for start, end in spans: label[start:end] = row[start:end]
    pad = lambda values, fill: pad_sequence(values, batch_first=True, padding_value=fill)
    return {'input_ids': pad(rows, 0), 'attention_mask': pad([torch.ones_like(row) for row in rows], 0), 'labels': pad(labels, -100)}


@pytest.fixture(scope='module')
def batch():
    "A system turn that all share, a prompt that two share (a preference pair), two turns in one row, rows of unlike length."
    torch.manual_seed(1)
    new = lambda n: torch.randint(3, 96, (n,))
    system, prompt = new(24), new(20)
    rows = [torch.cat([system, prompt, new(9)]), torch.cat([system, prompt, new(4)]), torch.cat([system, new(30)]), torch.cat([system, new(17)]), new(12)]
    return batch_of(rows, [[(44, 53)], [(44, 48)], [(30, 34), (48, 54)], [(24, 40)], [(5, 9)]])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch, reference=None):
    "Ours equals the plain padded forward, in loss and gradient."
    reference = reference or model
    expected = reference(**batch).loss
    theirs = gradients(reference, expected)
    found = answer_loss(model, batch)
    ours = gradients(model, found)
    assert abs(found.item() - expected.item()) < 1e-5 * max(1, abs(expected.item()))
    assert ours.keys() == theirs.keys() and ours
    largest = max(one.norm() for one in theirs.values())
    for name in theirs: assert (ours[name] - theirs[name]).norm() <= 1e-5 * max(theirs[name].norm(), 1e-3 * largest), name


def test_the_families_that_need_no_trial_are_the_ones_tested_here():
    assert TESTED == set(FAMILIES)


@pytest.mark.parametrize('family', FAMILIES)
def test_packed_equals_padded(family, batch):
    model = made(family)
    assert why_padded(model, batch) == ''
    assert_same(model, batch)


def test_a_batch_is_laid_out_as_a_tree(batch):
    layout = lay_out(batch)
    assert len(layout.levels) == 3 and layout.tokens < 0.6 * layout.padded


@pytest.mark.parametrize('family, more, why', [('gemma2', {'head_dim': 16}, 'bends'), ('mistral', {'sliding_window': 40}, 'see 40 tokens'),
                                               ('bloom', {'n_layer': 2, 'n_head': 6, 'n_embed': 48}, 'cannot be replaced'),
                                               ('gpt_oss', {'head_dim': 8, 'num_local_experts': 2, 'num_experts_per_tok': 1}, 'sinks')])
def test_what_cannot_be_packed_is_padded_and_says_why(family, more, why, batch):
    model = made(family, **more)
    assert why in why_padded(model, batch)
    if family != 'gpt_oss': assert_same(model, batch)


def test_an_unknown_family_is_tried_on_its_first_batch(batch, monkeypatch):
    monkeypatch.setattr('finetune_nb.model.step.TESTED', set())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model = made('llama')
        assert why_padded(model, batch) == ''
    monkeypatch.setattr('finetune_nb.model.attention._shares', lambda queries, keys, level, scale: torch.softmax(queries @ keys.mT, -1))
    with pytest.warns(UserWarning, match='differ'): assert 'differ' in why_padded(other := made('llama'), batch)
    monkeypatch.undo()
    assert_same(other, batch)


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('recompute', [False, True])
def test_any_attention_and_gradient_checkpointing(attention, recompute, batch):
    model, plain = made('llama', attn_implementation=attention), made('llama')
    if recompute: model.gradient_checkpointing_enable({'use_reentrant': False})
    assert_same(model, batch, plain)
    if not recompute: assert model.config._attn_implementation == attention


@pytest.mark.parametrize('family, settings', [('llama', {}), ('llama', {'use_dora': True}), ('llama', {'use_rslora': True}), ('qwen2', {}),
                                              ('llama', {'target_modules': ['q_proj', 'v_proj']}), ('gpt2', {'fan_in_fan_out': True})])
def test_adapters_as_they_are_and_accelerated(family, settings, batch):
    learner = get_peft_model(made(family), LoraConfig(**{'r': 4, 'target_modules': 'all-linear', 'init_lora_weights': False, **settings}))
    fast = copy.deepcopy(learner)
    assert (accelerate_adapters(fast) > 0) == (family != 'gpt2')
    assert_same(learner, batch)
    assert_same(fast, batch, learner)


@pytest.mark.parametrize('recompute', [False, True])
def test_the_whole_curve_with_the_optimiser(recompute, batch):
    start = get_peft_model(made('llama'), LoraConfig(r=4, target_modules='all-linear'))
    fast, curves = copy.deepcopy(start), []
    accelerate_adapters(fast)
    if recompute: fast.gradient_checkpointing_enable({'use_reentrant': False})
    for model, loss in ((start, lambda: start(**batch).loss), (fast, lambda: answer_loss(fast, batch))):
        optimiser, curve = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), []
        for _ in range(12):
            now = loss()
            now.backward()
            optimiser.step()
            optimiser.zero_grad()
            curve.append(now.item())
        curves.append(curve)
    assert curves[0][-1] < curves[0][0] - 0.02
    assert max(abs(a - b) for a, b in zip(*curves)) < 1e-4


def test_learned_prompts_are_called_whole(batch):
    learner = get_peft_model(made('llama'), PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=4))
    assert 'learned' in why_padded(learner, batch)
    assert_same(learner, batch)


def test_dropout_is_drawn_for_each_row(batch):
    model = made('opt', dropout=0.5)
    twice = {name: tensor[:1].repeat(2, 1) for name, tensor in batch.items()}
    first, second = token_losses(model, twice).chunk(2)
    assert not torch.allclose(first, second)
    model.eval()
    first, second = token_losses(model, twice).chunk(2)
    assert torch.allclose(first, second)


def test_eight_times_one_is_one_times_eight(batch):
    model = made('llama')
    total = int((batch['labels'][:, 1:] != -100).sum())
    whole = gradients(model, answer_loss(model, batch, total))
    model.zero_grad()
    losses = 0.0
    for row in range(len(batch['input_ids'])):
        loss = answer_loss(model, {name: tensor[row:row + 1] for name, tensor in batch.items()}, total)
        loss.backward()
        losses += loss.item()
    assert losses == pytest.approx(answer_loss(model, batch, total).item(), rel=1e-6)
    for name, p in model.named_parameters(): assert (p.grad - whole[name]).norm() <= 2e-5 * max(whole[name].norm(), 1e-4), name


def test_scores_are_those_of_the_padded_model(batch):
    model = made('llama')
    scores, labels = answer_scores(model, batch)
    later = batch['labels'][:, 1:]
    assert torch.equal(labels, later[later != -100])
    assert torch.allclose(scores, model(**{k: batch[k] for k in ('input_ids', 'attention_mask')}).logits[:, :-1][later != -100], atol=1e-5)


def test_four_bits(batch):
    pytest.importorskip('bitsandbytes')
    from bitsandbytes.nn import Linear4bit
    model = made('llama', hidden_size=64, intermediate_size=64, num_attention_heads=4)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != 'lm_head']:
        four = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32, quant_type='nf4')
        four.load_state_dict(layer.state_dict())
        model.get_submodule(name.rpartition('.')[0]).__setattr__(name.rpartition('.')[2], four.to('cpu'))
    for p in model.parameters(): p.requires_grad_(False)
    learner = get_peft_model(model, LoraConfig(r=4, target_modules='all-linear', init_lora_weights=False))
    assert_same(learner, batch)


@pytest.mark.parametrize('rows', [[[5]], [[5, 6]], [[5, 6, 7], [5, 6, 7]]])
def test_the_smallest_batches(rows):
    rows = [torch.tensor(row) for row in rows]
    model = made('llama')
    one = batch_of(rows, [[(0, len(row))] for row in rows])
    assert len(token_losses(model, one)) == sum(len(row) - 1 for row in rows)
    answer_loss(model, one).backward()
    if len(rows[0]) > 1: assert_same(model, one)


WRAPPED = """
    import os, sys, torch, torch.distributed as dist
    sys.path.insert(0, 'tests')
    from test_step import answer_loss, batch_of, gradients, made, why_padded
    kind, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    torch.manual_seed(3)
    system = torch.randint(3, 96, (20,))
    rows = [torch.cat([system, torch.randint(3, 96, (n,))]) for n in (5, 9, 7, 12)]
    whole = batch_of(rows, [[(22, len(row))] for row in rows])
    mine = {name: tensor[2 * rank:2 * rank + 2] for name, tensor in whole.items()}
    total = int((whole['labels'] != -100).sum())
    plain = made('llama')
    expected = gradients(plain, plain(**whole).loss)
    model = made('llama')
    if kind == 'ddp': model = torch.nn.parallel.DistributedDataParallel(model)
    if kind == 'fsdp2':
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.device_mesh import init_device_mesh
        mesh = init_device_mesh('cpu', (2,))
        for layer in model.model.layers: fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    assert why_padded(model, mine) == ''
    loss = answer_loss(model, mine, total) * 2     # the wrapper averages over processes
    loss.backward()
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if kind == 'fsdp2' else p.grad
        assert (grad - expected[name.removeprefix('module.')]).norm() < 1e-5 * expected[name.removeprefix('module.')].norm().clamp(min=1e-3), name
    print('same')
    dist.destroy_process_group()
"""


@pytest.mark.parametrize('kind', ['ddp', pytest.param('fsdp2', marks=pytest.mark.slow)])
def test_through_a_wrapper_of_two_processes(kind, tmp_path):
    script = tmp_path / 'wrapped.py'
    script.write_text(textwrap.dedent(WRAPPED))
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': os.getcwd(), 'GLOO_SOCKET_IFNAME': 'lo'}
    two = [subprocess.Popen([sys.executable, script, kind, str(rank), tmp_path / 'store'], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True) for rank in range(2)]
    try: said = [one.communicate(timeout=200) for one in two]
    finally:
        for one in two: one.kill()
    assert all('same' in out for out, _ in said), said[0][1][-3000:]
