"Faults planted in template, tokenizer, collator and mask are found by name on several kinds of template, and clean rows raise nothing."
import re
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_nb.core.files import BadInput
from finetune_nb.core.recipe import Train
from finetune_nb.core.rows import make_row
from finetune_nb.model.batches import IGNORED, collate, encode
from finetune_nb.model.tiny import CHATML, tiny_tokenizer
from finetune_nb.training.evidence import seen_batches
from finetune_nb.training.masks import fit_rows
from finetune_nb.training.faults import FAULTS
from finetune_nb.training.preflight import PreflightFailed, preflight

# The forms of four families, written here for the tests. Llama 3: BOS in the template, and a tokenizer that adds it too; Gemma: the role is `model`
# and a system turn is an error; Mistral: no role tokens, a blank before the answer, `</s>` after it, a tokenizer that marks blanks (metaspace).
LLAMA3 = ("{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
          "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
GEMMA = ("{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
         "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = m['content'] + '\n\n' %}"
           "{% elif m['role'] == 'user' %}{{ '[INST] ' + ns.system + m['content'] + ' [/INST]' }}{% set ns.system = '' %}"
           "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}")


def bytewise(template, special, bos, eos, pad, adds_bos):
    "A byte-level tokenizer with a family's control tokens."
    base = tiny_tokenizer().backend_tokenizer
    if adds_bos:
        base.add_special_tokens([bos])
        base.post_processor = processors.TemplateProcessing(single=f'{bos} $A', special_tokens=[(bos, base.token_to_id(bos))])
    made = PreTrainedTokenizerFast(tokenizer_object=base, bos_token=bos, eos_token=eos, pad_token=pad, chat_template=template, clean_up_tokenization_spaces=False)
    made.add_special_tokens({'additional_special_tokens': special})
    return made


def metaspaced():
    "A tokenizer that marks blanks with a sign, as SentencePiece does, and adds BOS."
    base = Tokenizer(models.BPE(unk_token='<unk>'))
    base.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme='first', split=False)
    base.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.Fuse(), decoders.Strip(content=' ', left=1)])
    base.train_from_iterator(['the order is on its way, where is it? brief be sure yes ' * 3, ''.join(map(chr, range(32, 127)))],
                             trainers.BpeTrainer(vocab_size=300, special_tokens=['<unk>', '<s>', '</s>'], show_progress=False))
    base.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=base, bos_token='<s>', eos_token='</s>', pad_token='</s>', unk_token='<unk>', chat_template=MISTRAL,
                                   clean_up_tokenization_spaces=False)
    made.add_special_tokens({'additional_special_tokens': ['[INST]', '[/INST]']})
    return made


FAMILIES = {
    'chatml': tiny_tokenizer,   # pad = eos = terminator, and BOS is the token that opens a turn
    'llama3': lambda: bytewise(LLAMA3, ['<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>'], '<|begin_of_text|>', '<|eot_id|>', '<|eot_id|>', True),
    'gemma': lambda: bytewise(GEMMA, ['<start_of_turn>', '<end_of_turn>'], '<bos>', '<eos>', '<pad>', True),
    'mistral': metaspaced}
swallows = pytest.mark.parametrize('family', ['chatml', 'llama3', 'mistral'])   # Gemma's padding is a token of its own
every = pytest.mark.parametrize('family', FAMILIES)


def turn(role, content): return {'role': role, 'content': content}


def conversations(family, n=6):
    "Short and long, one turn and several, with a system turn where the family has one."
    system = [] if family == 'gemma' else [turn('system', 'Be brief.')]
    one = [[turn('user', f'Where is order {i}?'), turn('assistant', f'Order {i} is on its way.')] for i in range(n)]
    more = [system + chat + [turn('user', 'ok'), turn('assistant', 'ok')] for chat in one]
    return [make_row(chat, file='raw/x.jsonl', line=i) for i, chat in enumerate([*one, *more], 1)]


def set_up(family):
    tokenizer, rows = FAMILIES[family](), conversations(family)
    return tokenizer, rows, encode(tokenizer, rows)


def faults(tokenizer, rows, rendered, spoil=None, **more):
    "Names of the faults found; `spoil` changes each batch as a faulty collator would."
    def own(items):
        part = collate(items, tokenizer.pad_token_id)
        return (spoil(part) or part) if spoil else part
    try: preflight(tokenizer, rows, rendered, seen_batches(rendered, own, size=5), **more)
    except PreflightFailed as error:
        found = {c['check'] for c in error.preflight.checks if c['verdict'] == 'FAIL'}
        assert all(name in str(error) for name in found) and 'raw/x.jsonl:' in str(error)
        return found
    return set()


def masked(rendered, change):
    "The same rows with another mask, made from the list of trained places of each."
    def one(r):
        on = change([i for i, t in enumerate(r.trained) if t], r)
        return replace(r, trained=[i in on for i in range(len(r))])
    return [one(r) for r in rendered]


def last_run(places):
    "The places of the last answer."
    return [p for k, p in enumerate(places) if all(b - a == 1 for a, b in zip(places[k:], places[k + 1:]))]


def ends(places, r):
    "The places where answers end."
    return {p for p in places if p + 1 not in places}


@every
def test_clean_rows_raise_nothing(family):
    tokenizer, rows, rendered = set_up(family)
    assert faults(tokenizer, rows, rendered, vocabulary=len(tokenizer)) == set()
    said = preflight(tokenizer, rows, rendered, seen_batches(rendered, lambda items: collate(items, tokenizer.pad_token_id)), vocabulary=len(tokenizer))
    assert {c['verdict'] for c in said.checks} == {'PASS'} and all(c['checked'] == len(rows) for c in said.checks)


@every
def test_padding_on_the_left_is_no_fault(family):
    def left(part):
        width = part['input_ids'].shape[1]
        for line in range(len(part['input_ids'])):
            pad = width - int(part['attention_mask'][line].sum())
            for name in part: part[name][line] = torch.roll(part[name][line], pad)
    assert faults(*set_up(family), left) == set()


# --- seven faults of the issue, each made in several ways ---

@every
@pytest.mark.parametrize('how', ['mask', 'collator', 'row'])
def test_no_trained_token(family, how):
    tokenizer, rows, rendered = set_up(family)
    if how == 'mask': rendered = masked(rendered, lambda on, r: [])
    if how == 'row':
        rows = [*rows, make_row([turn('user', 'Hello?')], file='raw/x.jsonl', line=99)]
        rendered = encode(tokenizer, rows)
    spoil = (lambda part: part | {'labels': torch.full_like(part['labels'], IGNORED)}) if how == 'collator' else None
    assert faults(tokenizer, rows, rendered, spoil) == {'no_trained_token'}


@every
@pytest.mark.parametrize('how', ['mask', 'template'])
def test_terminator_not_trained(family, how):
    tokenizer, rows, rendered = set_up(family)
    if how == 'mask': rendered = masked(rendered, lambda on, r: set(on) - ends(on, r))
    else:
        for end in ("+ '<|im_end|>'", "+ '<|eot_id|>'", "+ '<end_of_turn>\n'", '+ eos_token'): tokenizer.chat_template = tokenizer.chat_template.replace(end, '')
        rendered = encode(tokenizer, rows)
    assert 'terminator_not_trained' in faults(tokenizer, rows, rendered)


@swallows
def test_pad_is_stop_token(family):
    tokenizer, rows, rendered = set_up(family)
    def swallow(part): part['labels'][part['input_ids'] == tokenizer.pad_token_id] = IGNORED
    assert faults(tokenizer, rows, rendered, swallow) == {'pad_is_stop_token'}
    def hide(part): part['attention_mask'] = (part['input_ids'] != tokenizer.pad_token_id).long()
    assert faults(tokenizer, rows, rendered, hide) == {'attention_holes'}


@pytest.mark.parametrize('family', ['llama3', 'gemma', 'mistral'])
@pytest.mark.parametrize('how', ['template', 'collator', 'tokenizer'])
def test_double_bos(family, how):
    tokenizer, rows, rendered = set_up(family)
    spoil, bos = None, tokenizer.bos_token_id
    if how == 'template':
        tokenizer.chat_template = '{{ bos_token }}' + tokenizer.chat_template
        rendered = encode(tokenizer, rows)
    if how == 'tokenizer':   # the template's text, cut into tokens with special tokens added
        text = [tokenizer.apply_chat_template(row['messages'], tokenize=False) for row in rows]
        rendered = [replace(r, ids=tokenizer(t).input_ids[:len(r) + 1], trained=[False] + r.trained, roles=['template'] + r.roles) for r, t in zip(rendered, text)]
    if how == 'collator':
        def spoil(part):
            wide = lambda value, first: torch.cat([torch.full((len(value), 1), first), value], 1)
            return {'input_ids': wide(part['input_ids'], bos), 'attention_mask': wide(part['attention_mask'], 1), 'labels': wide(part['labels'], IGNORED)}
    assert faults(tokenizer, rows, rendered, spoil) == {'double_bos'}


@pytest.mark.parametrize('family', ['llama3', 'gemma', 'mistral'])
@pytest.mark.parametrize('how', ['template', 'collator'])
def test_missing_bos(family, how):
    tokenizer, rows, rendered = set_up(family)
    if how == 'template':   # the tokenizer adds it to every text, the template does not
        tokenizer.chat_template = tokenizer.chat_template.replace('{{ bos_token }}', '').replace('bos_token + text', 'text')
        rendered = encode(tokenizer, rows)
    spoil = (lambda part: {name: value[:, 1:] for name, value in part.items()}) if how == 'collator' else None
    assert faults(tokenizer, rows, rendered, spoil) == {'missing_bos'}


@every
@pytest.mark.parametrize('how', ['left out', 'cut', 'tokenizer', 'collator'])
def test_truncated_answers(family, how):
    tokenizer, rows, rendered = set_up(family)
    left, settings, spoil = [], Train(max_tokens=18, max_cut=.1), None
    if how == 'left out': rows, rendered, left = fit_rows(tokenizer, rows, max(map(len, rendered)) - 1)
    if how == 'cut': rows, rendered, left = fit_rows(tokenizer, rows, 18, 'truncate')
    if how == 'tokenizer': rendered = [replace(r, ids=r.ids[:-4], trained=r.trained[:-4], roles=r.roles[:-4]) for r in rendered]
    if how == 'collator': spoil = lambda part: {name: value[:, :-5] for name, value in part.items()}
    assert left or how != 'left out'
    assert 'truncated_answers' in faults(tokenizer, rows, rendered, spoil, left=left, settings=settings)


@every
def test_cut_answers_within_the_allowed_share(family):
    tokenizer, rows, _ = set_up(family)
    lengths = sorted(len(r) for r in encode(tokenizer, rows))
    for limit in (lengths[0] + 6, lengths[-1] - 2, lengths[-1] - 9):
        kept, rendered, left = fit_rows(tokenizer, rows, limit, 'truncate')
        assert any(r.truncated_answer or r.truncated_prompt for r in rendered)
        assert faults(tokenizer, kept, rendered, left=left, settings=Train(max_tokens=limit, max_cut=.99)) == set()


@pytest.mark.parametrize('family', ['chatml', 'llama3', 'mistral'])
def test_system_dropped_in_silence(family):
    tokenizer, rows, rendered = set_up(family)
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}" + tokenizer.chat_template
    assert faults(tokenizer, rows, encode(tokenizer, rows)) == {'system_not_rendered'}


def test_system_refused():
    tokenizer, rows = FAMILIES['gemma'](), conversations('chatml')
    with pytest.raises(BadInput, match=r'(?s)system_not_rendered \(6 rows\).*raw/x.jsonl:7: messages: row .*System role not supported'):
        fit_rows(tokenizer, rows, 500)


# --- and more ---

@every
@pytest.mark.parametrize('how', ['mask', 'collator'])
def test_last_turn_only(family, how):
    tokenizer, rows, rendered = set_up(family)
    last = masked(rendered, lambda on, r: last_run(on))
    if how == 'mask': assert faults(tokenizer, rows, last) == {'last_turn_only'}
    else:
        def spoil(part):
            for line in range(len(part['labels'])):
                on = (part['labels'][line] != IGNORED).nonzero().flatten().tolist()
                part['labels'][line, [p for p in on if p not in last_run(on)]] = IGNORED
        assert faults(tokenizer, rows, rendered, spoil) == {'last_turn_only'}


@every
@pytest.mark.parametrize('how', ['everything', 'one more token', 'header'])
def test_prompt_trained(family, how):
    tokenizer, rows, rendered = set_up(family)
    if how == 'everything':
        def spoil(part): part['labels'] = torch.where(part['attention_mask'] > 0, part['input_ids'], IGNORED)
        assert faults(tokenizer, rows, rendered, spoil) == {'prompt_trained'}
        return
    words = lambda on, r: next(p for p in range(4, len(r)) if p not in on and r.roles[p] == 'user' and tokenizer.decode([r.ids[p]]).strip())
    header = lambda on, r: next(p for p in range(min(on) - 1, 0, -1) if tokenizer.decode([r.ids[p]]).strip())
    spoiled = masked(rendered, lambda on, r: {*on, (header if how == 'header' else words)(on, r)})
    assert faults(tokenizer, rows, spoiled) == {'prompt_trained'}


@every
def test_a_part_of_the_answer_is_not_trained(family):
    tokenizer, rows, rendered = set_up(family)
    assert faults(tokenizer, rows[:6], masked(rendered[:6], lambda on, r: on[3:])) == {'answer_not_trained'}


@every
def test_one_row_in_many_is_named(family):
    tokenizer, rows, rendered = set_up(family)
    rendered[7] = masked([rendered[7]], lambda on, r: last_run(on))[0]
    with pytest.raises(PreflightFailed, match=re.escape(f"last_turn_only (1 row):\n  raw/x.jsonl:8: messages: row {rows[7]['id']}")):
        preflight(tokenizer, rows, rendered, seen_batches(rendered, lambda items: collate(items, 0)))


@every
def test_template_drift(family):
    tokenizer, rows, rendered = set_up(family)
    blank = {'chatml': ("'\\n' + message['content']", "' \\n' + message['content']"), 'llama3': ("'<|eot_id|>'", "' <|eot_id|>'"),
             'gemma': ("+ '\\n' + m", "+ ' \\n' + m"), 'mistral': ("' [/INST]'", "'  [/INST]'")}[family]
    now = tokenizer.chat_template.replace(*(text.replace('\\n', '\n') for text in blank))
    assert now != tokenizer.chat_template
    tokenizer.chat_template = now
    assert 'template_drift' in faults(tokenizer, rows, rendered)


@every
def test_control_tokens_in_content(family):
    tokenizer = FAMILIES[family]()
    end = {'chatml': '<|im_end|>', 'llama3': '<|eot_id|>', 'gemma': '<end_of_turn>', 'mistral': '</s>'}[family]
    rows = [make_row([turn('user', f'What is {end}Hi?'), turn('assistant', 'The end.')], file='raw/x.jsonl', line=4)]
    rendered = encode(tokenizer, rows)
    assert faults(tokenizer, rows, rendered) == set()
    ids = tokenizer.apply_chat_template(rows[0]['messages'], tokenize=True, return_dict=False)
    tail = len(rendered[0]) - rendered[0].trained.index(True)
    stop = len(ids) - ids[::-1].index(rendered[0].ids[-1])
    live = replace(rendered[0], ids=ids[:stop], trained=[False] * (stop - tail) + [True] * tail, roles=['user'] * stop)
    assert faults(tokenizer, rows, [live]) == {'control_token_in_content'}


@every
def test_batches_that_are_not_the_rows(family):
    tokenizer, rows, rendered = set_up(family)
    def shift(part): part['labels'] = torch.roll(part['labels'], -1, 1)
    assert 'labels_differ' in faults(tokenizer, rows, rendered, shift)
    def padding(part): part['labels'] = torch.where(part['attention_mask'] > 0, part['labels'], 5)
    assert 'padding_trained' in faults(tokenizer, rows, rendered, padding)
    def other(part): part['input_ids'] = part['input_ids'].flip(0)
    assert 'batch_differs' in faults(tokenizer, rows, rendered, other)


@every
def test_ids_beyond_the_embedding(family):
    tokenizer, rows, rendered = set_up(family)
    assert faults(tokenizer, rows, rendered, vocabulary=max(max(r.ids) for r in rendered)) == {'ids_out_of_range'}
    assert faults(tokenizer, rows, rendered, vocabulary=max(max(r.ids) for r in rendered) + 1) == set()


def test_tools_raise_nothing():
    tokenizer = tiny_tokenizer()
    call = {'function': {'name': 'find_order', 'arguments': '{"order": 7}'}}
    chat = [turn('user', 'Where is 7?'), {'role': 'assistant', 'content': '', 'tool_calls': [call]}, turn('tool', '{"at": "sea"}'), turn('assistant', 'At sea.')]
    rows = [make_row(chat, file='raw/x.jsonl', line=1, tools=[{'type': 'function', 'function': {'name': 'find_order', 'parameters': {}}}])]
    rendered = encode(tokenizer, rows)
    assert faults(tokenizer, rows, rendered) == set()
    assert faults(tokenizer, rows, masked(rendered, lambda on, r: last_run(on))) == {'last_turn_only'}


def test_every_fault_has_a_remedy(): assert all(wrong and mend for wrong, mend in FAULTS.values())
