"Predicted memory against what was published for larger models, and against what is measured here."
import json
import mmap
import os
import subprocess
import sys

import pytest

from finetune_nb.model.memory import estimate, measured_memory, measured_terms, memory_table, shape

# Sources. Qwen: README of github.com/QwenLM/Qwen, "Profiling of Memory and Speed" (one A100, batch 1, FlashAttention 2, gradient checkpointing, LoRA of
# rank 64 on c_attn, c_proj, w1, w2; GB by sequence length). ZeRO: Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1: 16 bytes a parameter of model
# states with Adam, "at least 24 GB" for GPT-2 with 1.5 billion. Their step is not ours: it accumulates over eight forward passes, so gradients wait, and its loss
# keeps the scores of all positions once more in float32, which is added below; lengths beyond our slice of scores are left out.
QWEN_7B = dict(parameters=7_721_324_544, hidden=4096, layers=32, intermediate=11008, heads=32, kv_heads=32, vocab=151_936, tied=0, trainable=143_130_624)
QWEN_1_8B = dict(parameters=1_836_828_672, hidden=2048, layers=24, intermediate=5504, heads=16, kv_heads=16, vocab=151_936, tied=0, trainable=53_673_984)
PUBLISHED = [(QWEN_7B, 'lora', 256, 20.1), (QWEN_7B, 'lora', 1024, 21.5), (QWEN_7B, 'lora', 2048, 23.8),
             (QWEN_7B, 'qlora', 256, 11.5), (QWEN_7B, 'qlora', 1024, 12.3), (QWEN_7B, 'qlora', 2048, 13.9), (QWEN_1_8B, 'lora', 256, 6.7)]


@pytest.mark.parametrize('model, approach, length, published', PUBLISHED)
def test_published_figures(model, approach, length, published):
    found = estimate(approach=approach, batch_tokens=length, length=length, dtype='bfloat16', rank=64, trained_share=1.0, checkpointing=True, fused=True,
                     accumulates=True, **model)
    assert found['total_gb'] + 4 * length * model['vocab'] / 1e9 == pytest.approx(published, rel=.2), found


def test_model_states_of_the_zero_paper():
    found = estimate(1_500_000_000, 'full', 1024, 'float32')
    assert found['weights'] + found['gradients'] + found['optimiser'] == pytest.approx(24.0, rel=1e-3)


def test_terms_grow_with_what_they_are_of():
    of = lambda **more: estimate(135_000_000, batch_tokens=1024, **{'approach': 'lora', 'dtype': 'float32'} | more)
    assert of(rank=64)['optimiser'] == pytest.approx(4 * of(rank=16)['optimiser'], rel=.05)
    assert of(dtype='bfloat16')['weights'] == of()['weights'] / 2
    assert of(length=1024)['activations'] > of(length=128)['activations'] and of(fused=True, length=1024)['activations'] < of(length=1024)['activations']
    assert of(checkpointing=True)['activations'] < of()['activations'] / 5
    assert of(approach='inference')['gradients'] == 0


MEASURE = '''
import json, sys
import torch
from finetune_nb.model.adapters import accelerate_adapters, tune_processor
from finetune_nb.model.loading import load_model
from finetune_nb.model.memory import measured_memory, measured_terms, resident_gb
from finetune_nb.model.step import answer_loss
from peft import LoraConfig, get_peft_model
name, approach, dtype, rows, length, steps = sys.argv[1:3] + [sys.argv[3], *map(int, sys.argv[4:])]
libraries = resident_gb()
tune_processor()   # as a training does
loaded = load_model(name, dtype, 'cpu', attention='eager')
model = loaded.model.requires_grad_(approach == 'full').train()
model.config.use_cache = False
if approach == 'lora': model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules='all-linear', task_type='CAUSAL_LM'))
accelerate_adapters(model)
optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
ids = torch.randint(10, len(loaded.tokenizer), (rows, length), generator=torch.Generator().manual_seed(0))
labels = ids.clone()
labels[:, :length // 2] = -100
for step in range(steps):
    with measured_memory() as found:
        answer_loss(model, {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': labels}, float((labels != -100).sum())).backward()
        optimiser.step()
        optimiser.zero_grad()
print(json.dumps(measured_terms(model, optimiser, found, libraries)))
'''


def measured(*words):
    "Terms of a training step in a process of its own."
    done = subprocess.run([sys.executable, '-c', MEASURE, *map(str, words)], capture_output=True, text=True, timeout=500, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize('approach', ['lora', 'full'])
def test_standing_terms_are_as_predicted_on_a_tiny_model(tiny_model, approach):
    found, config = measured(tiny_model, approach, 'float32', 2, 64, 2), json.loads((tiny_model / 'config.json').read_text())
    from finetune_nb.selection.candidates import count_parameters
    foreseen = estimate(count_parameters(tiny_model), approach, 128, length=64, **shape(config))
    for name in ('weights', 'adapter', 'optimiser'): assert found[name] == pytest.approx(foreseen[name], abs=.002), name
    assert 'NOT MEASURED' in memory_table(foreseen, None).markdown and 'NOT MEASURED' not in memory_table(foreseen, found).markdown


def test_a_peak_is_of_its_own_stretch():
    with measured_memory() as first:
        block = mmap.mmap(-1, 200_000_000)   # new pages, whatever the process has kept from before
        for page in range(0, len(block), mmap.PAGESIZE): block[page] = 1
    block.close()
    with measured_memory() as second: pass
    if first.how != 'resident size': pytest.skip('this system keeps one peak for the whole process')
    assert first.peak_gb - first.before_gb == pytest.approx(.2, abs=.02) and second.peak_gb - second.before_gb < .05


@pytest.mark.slow
@pytest.mark.parametrize('approach, dtype, rows, length', [('lora', 'bfloat16', 8, 143), ('lora', 'float32', 4, 200), ('full', 'float32', 4, 143)])
def test_the_peak_of_the_starter_within_fifteen_percent(approach, dtype, rows, length):
    found = measured('starter', approach, dtype, rows, length, 3)
    from finetune_nb.model.starter import fetch_starter
    config = json.loads((fetch_starter() / 'config.json').read_text())
    foreseen = estimate(134_515_008, approach, rows * length, dtype, length=length, trained_share=.5, **shape(config))
    assert foreseen['total_gb'] == pytest.approx(found['total_gb'], rel=.15), (foreseen, found)
