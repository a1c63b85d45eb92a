"Planted secrets and personal data are found, look-alikes and real public text are left alone."
import base64
import gzip
import json
import os
import random
import string
from pathlib import Path

import pytest

from finetune_nb.core.rows import make_row
from finetune_nb.core.sections import Clean
from finetune_nb.curation.clean import clean_row, redacted

DATA = Path(os.environ.get('FINETUNE_NB_DATA') or Path(__file__).parents[1] / '../shared/data')
ALNUM = string.ascii_letters + string.digits
CARRIERS = ('Please look at {} and tell me what is wrong.', 'It says: {}', 'My colleague sent {}, what now?', 'Note\n{}\nend of note', '{"field": "{}", "n": 3}', '系统显示{}，请处理。')


def drawn(dice: random.Random, n: int, letters: str = ALNUM) -> str:
    "A random string that surely has a digit and a letter."
    return ''.join(dice.choice(letters) for _ in range(n - 2)) + dice.choice([c for c in letters if c.isdigit()]) + dice.choice([c for c in letters if c.isalpha()])


HEX = '0123456789abcdef'
SECRETS = {   # provider -> a key of its form
    'anthropic': lambda d: 'sk-ant-api03-' + drawn(d, 80, ALNUM + '_-'), 'openai': lambda d: 'sk-' + drawn(d, 48), 'openai project': lambda d: 'sk-proj-' + drawn(d, 60), 'openrouter': lambda d: 'sk-or-v1-' + drawn(d, 64, HEX),
    'aws id': lambda d: 'AKIA' + drawn(d, 16, string.ascii_uppercase + '234567'), 'aws pair': lambda d: f'AKIA{drawn(d, 16, string.ascii_uppercase + "234567")} {drawn(d, 40)}',
    'github': lambda d: 'ghp_' + drawn(d, 36), 'github fine': lambda d: f'github_pat_{drawn(d, 22)}_{drawn(d, 59)}', 'gitlab': lambda d: 'glpat-' + drawn(d, 20), 'slack': lambda d: f'xoxb-{d.randrange(10**11, 10**12)}-{drawn(d, 24)}',
    'slack hook': lambda d: f'https://hooks.slack.com/services/T{drawn(d, 8)}/B{drawn(d, 8)}/{drawn(d, 24)}', 'stripe': lambda d: 'sk_live_' + drawn(d, 24), 'twilio': lambda d: 'SK' + drawn(d, 32, HEX),
    'sendgrid': lambda d: f'SG.{drawn(d, 22)}.{drawn(d, 43)}', 'npm': lambda d: 'npm_' + drawn(d, 36), 'pypi': lambda d: 'pypi-AgEIcHlwaS5vcmc' + drawn(d, 60), 'hf': lambda d: 'hf_' + drawn(d, 34), 'google': lambda d: 'AIza' + drawn(d, 35),
    'azure storage': lambda d: f'DefaultEndpointsProtocol=https;AccountName=acme;AccountKey={drawn(d, 86)}==;EndpointSuffix=core.windows.net', 'groq': lambda d: 'gsk_' + drawn(d, 52), 'telegram': lambda d: f'{d.randrange(10**9, 10**10)}:AA{drawn(d, 33)}',
    'jwt': lambda d: '.'.join(('eyJ' + drawn(d, 30), 'eyJ' + drawn(d, 60), drawn(d, 43))), 'pem': lambda d: f'-----BEGIN RSA PRIVATE KEY-----\n{drawn(d, 64)}\n{drawn(d, 64)}\n-----END RSA PRIVATE KEY-----',
    'openssh': lambda d: f'-----BEGIN OPENSSH PRIVATE KEY-----\n{drawn(d, 70)}\n-----END OPENSSH PRIVATE KEY-----', 'pgp': lambda d: f'-----BEGIN PGP PRIVATE KEY BLOCK-----\n\n{drawn(d, 64)}\n-----END PGP PRIVATE KEY BLOCK-----',
    'gcp': lambda d: json.dumps({'type': 'service_account', 'private_key_id': drawn(d, 40, HEX), 'private_key': f'-----BEGIN PRIVATE KEY-----\n{drawn(d, 64)}\n-----END PRIVATE KEY-----\n'}),
    'postgres': lambda d: f'postgresql://app:{drawn(d, 16)}@db.acme.example:5432/prod', 'mongo': lambda d: f'mongodb+srv://root:{drawn(d, 12)}@cluster0.acme.example', 'redis': lambda d: f'redis://:{drawn(d, 20)}@cache:6379',
    'env': lambda d: f'API_KEY={drawn(d, 32)}', 'json': lambda d: f'client_secret: "{drawn(d, 24)}"', 'bearer': lambda d: f'Authorization: Bearer {drawn(d, 40)}', 'ado': lambda d: f'Server=db;User Id=sa;Password={drawn(d, 18)};',
}
NO_SECRETS = {   # what looks like one and opens nothing
    'sha': lambda d: f'commit {drawn(d, 40, HEX)}', 'sha256': lambda d: f'sha256:{drawn(d, 64, HEX)}', 'md5': lambda d: f'md5 {drawn(d, 32, HEX)}', 'uuid': lambda d: '-'.join(drawn(d, n, HEX) for n in (8, 4, 4, 4, 12)),
    'order': lambda d: f'order ORD-{d.randrange(10**9)}', 'isbn': lambda d: f'ISBN 978-{d.randrange(10)}-{d.randrange(10**6):06}-{d.randrange(10**2):02}-{d.randrange(10)}', 'version': lambda d: f'v{d.randrange(9)}.{d.randrange(20)}.{d.randrange(99)}-rc{d.randrange(9)}',
    'image': lambda d: 'data:image/png;base64,' + base64.b64encode(d.randbytes(60)).decode(), 'sample key': lambda d: 'sk-' + 'x' * d.randrange(20, 40), 'aws sample': lambda d: 'AKIAIOSFODNN7EXAMPLE', 'placeholder': lambda d: f'api_key = <YOUR_{d.choice(("API", "AWS"))}_KEY>',
    'code': lambda d: f'token = tokenizer_v{d.randrange(9)}.encode(sentence_{d.randrange(99)})', 'env name': lambda d: 'api_key=os.environ["OPENAI_API_KEY"]', 'url': lambda d: f'https://acme.example/item/{d.randrange(10**8)}?ref=mail_{d.randrange(99)}',
    'path': lambda d: f'/usr/lib/python3.{d.randrange(9)}/site-packages/module_{d.randrange(999)}', 'advice': lambda d: 'password: at least 12 characters, 1 digit', 'slug': lambda d: f'sk-learn-pipelines-for-beginners-part-{d.randrange(9)}',
    'doi': lambda d: f'doi:10.{d.randrange(1000, 9999)}/j.neunet.{d.randrange(2000, 2024)}.{d.randrange(99)}.{d.randrange(999):03}', 'arn': lambda d: 'arn:aws:s3:::my-bucket-2024-logs/archive', 'db sample': lambda d: 'postgres://user:password@localhost:5432/db',
}


def luhn(body: str) -> str:
    "The card number with its check digit."
    total = sum(sum(divmod(2 * int(c), 10)) if i % 2 == 0 else int(c) for i, c in enumerate(reversed(body)))
    return body + str(-total % 10)


def digits(dice: random.Random, n: int) -> str: return ''.join(dice.choice(string.digits) for _ in range(n))


def iban(dice: random.Random) -> str:
    "A German IBAN with right check digits."
    body = digits(dice, 18)
    return f'DE{98 - int(body + "131400") % 97:02}{body}'


def grouped(text: str) -> str: return ' '.join(text[i:i + 4] for i in range(0, len(text), 4))


def checked(module: str, make) -> object:
    "Draw until python-stdnum accepts."
    from importlib import import_module
    valid = import_module(f'stdnum.{module}').is_valid
    return lambda dice: next(text for text in (make(dice) for _ in range(100_000)) if valid(text))


PERSONAL = {   # rule and kind -> value
    ('pii.email', 'plain'): lambda d: f'{drawn(d, 6, string.ascii_lowercase + "12")}@acme.example', ('pii.email', 'dotted'): lambda d: f'ann.{drawn(d, 5, string.ascii_lowercase + "1")}+x@mail.acme.co.uk', ('pii.email', 'example.com'): lambda d: f'user{d.randrange(99)}@example.com',
    ('pii.phone', 'international'): lambda d: f'+49 {d.randrange(151, 179)} {d.randrange(10**6, 10**7)}', ('pii.phone', 'american'): lambda d: f'({d.randrange(212, 989)}) 555-{d.randrange(1000, 9999)}', ('pii.phone', 'dashed'): lambda d: f'{d.randrange(212, 989)}-555-{d.randrange(1000, 9999)}',
    ('pii.phone', 'german'): lambda d: f'0{d.randrange(151, 179)} {d.randrange(10**6, 10**7)}', ('pii.phone', 'named'): lambda d: f'phone {d.randrange(10**9, 10**10)}', ('pii.iban', 'spaced'): lambda d: grouped(iban(d)), ('pii.iban', 'plain'): iban,
    ('pii.card', 'visa'): lambda d: luhn('4' + digits(d, 14)), ('pii.card', 'spaced'): lambda d: grouped(luhn('51' + digits(d, 13))), ('pii.card', 'amex'): lambda d: luhn('37' + digits(d, 12)),
    ('pii.ip', 'v4'): lambda d: f'203.0.{d.randrange(10, 255)}.{d.randrange(1, 255)}', ('pii.ip', 'v6'): lambda d: f'2001:db8:{d.randrange(16, 4095):x}::{d.randrange(1, 4095):x}:{d.randrange(1000, 9999)}',
    ('pii.national_id', 'ssn'): checked('us.ssn', lambda d: f'{d.randrange(1, 899):03}-{d.randrange(1, 99):02}-{d.randrange(1, 9999):04}'), ('pii.national_id', 'nino'): lambda d: f'A{d.choice("BCEH")}{digits(d, 6)}{d.choice("ABCD")}',
    ('pii.national_id', 'steuer'): checked('de.idnr', lambda d: digits(d, 11)), ('pii.national_id', 'dni'): checked('es.dni', lambda d: digits(d, 8) + d.choice('TRWAGMYFPDXBNJZSQVHLCKE')), ('pii.national_id', 'cpf'): checked('br.cpf', lambda d: f'{digits(d, 3)}.{digits(d, 3)}.{digits(d, 3)}-{digits(d, 2)}'),
    ('pii.national_id', 'ric'): lambda d: '11010519491231002X', ('pii.national_id', 'nir'): checked('fr.nir', lambda d: f'{d.choice("12")}{digits(d, 2)}0{d.randrange(1, 9)}75{digits(d, 8)}'), ('pii.national_id', 'pesel'): checked('pl.pesel', lambda d: f'{d.randrange(50, 99)}0{d.randrange(1, 9)}{d.randrange(10, 28)}{digits(d, 5)}'),
    ('pii.national_id', 'personnummer'): checked('se.personnummer', lambda d: f'{d.randrange(50, 99)}0{d.randrange(1, 9)}{d.randrange(10, 28)}-{digits(d, 4)}'),
}
WORDS = {'steuer': 'Steuer-ID {}', 'pesel': 'PESEL {}'}
IMPERSONAL = {
    **{name: NO_SECRETS[name] for name in ('sha', 'sha256', 'uuid', 'order', 'isbn', 'version', 'image', 'doi', 'path')},
    'order number': lambda d: f'order {d.randrange(10**9, 10**10)}', 'price': lambda d: f'{d.randrange(1, 999)},{d.randrange(1000):03}.{d.randrange(100):02} USD', 'date': lambda d: f'{d.randrange(1950, 2030)}-{d.randrange(1, 12):02}-{d.randrange(1, 28):02} {d.randrange(24):02}:{d.randrange(60):02}:{d.randrange(60):02}',
    'sum': lambda d: f'{d.randrange(999)}+{d.randrange(999)}=<<{d.randrange(999)}+{d.randrange(999)}={d.randrange(1998)}>>', 'digits': lambda d: digits(d, d.choice((8, 9, 11, 12))), 'years': lambda d: ' '.join(str(d.randrange(1900, 2030)) for _ in range(5)), 'mention': lambda d: '@property def x',
    'version ip': lambda d: f'version 10.{d.randrange(9)}.{d.randrange(99)}.{d.randrange(99)}', 'mac': lambda d: ':'.join(drawn(d, 2, HEX) for _ in range(6)), 'sku': lambda d: f'SKU {d.randrange(100, 999)}-{d.randrange(100, 999)}-{d.randrange(1000, 9999)}', 'coordinates': lambda d: f'{d.uniform(-90, 90):.6f}, {d.uniform(-180, 180):.6f}',
    'scientific': lambda d: f'{d.random():.15f}', 'range': lambda d: f'pages {d.randrange(100, 999)}-{d.randrange(100, 999)}', 'loopback': lambda d: '127.0.0.1:8080', 'cpp': lambda d: 'std::vector<int>::iterator', 'bad card': lambda d: luhn('4' + digits(d, 14))[:-1] + 'x',
}


def row_with(dice: random.Random, value: str):
    "A row that carries the value in its question or its answer."
    text = dice.choice(CARRIERS).replace('{}', value)
    turns = [{'role': 'user', 'content': text if dice.random() < .5 else 'What is this?'}, {'role': 'assistant', 'content': 'I cannot say.'}]
    if turns[0]['content'] != text: turns[1]['content'] = text
    return make_row(turns, line=dice.randrange(10**9))


def test_secrets_are_found_and_lookalikes_are_not():
    dice, missed, false, n = random.Random(7), [], [], 25
    for kind, make in SECRETS.items():
        for _ in range(n):
            value = make(dice)
            problem = clean_row(row_with(dice, value)).problem
            if not problem or problem[0] != 'clean.secret': missed.append(kind)
            elif value in problem[1]: pytest.fail(f'{kind} was printed')
    for kind, make in NO_SECRETS.items(): false += [kind for _ in range(n) if clean_row(row_with(dice, make(dice))).problem]
    found = n * len(SECRETS) - len(missed)
    assert found / (n * len(SECRETS)) >= .98, sorted(set(missed))
    assert found / (found + len(false)) >= .98, sorted(set(false))


def test_quarantine_shows_no_secret():
    dice = random.Random(3)
    for kind, make in SECRETS.items():
        if kind in ('aws pair', 'gcp', 'ado', 'azure storage', 'postgres', 'mongo', 'redis', 'env', 'json', 'bearer', 'slack hook'): continue   # only a part of these is the secret
        value = make(dice)
        assert value not in json.dumps(redacted(row_with(dice, value)), ensure_ascii=False).replace('\\n', '\n'), kind


def test_personal_data_is_found_and_lookalikes_are_not():
    dice, missed, false, n = random.Random(11), [], [], 25
    for (rule, kind), make in PERSONAL.items():
        for _ in range(n):
            value = make(dice)
            done = clean_row(row_with(dice, WORDS.get(kind, '{}').format(value)))
            if done.problem or not done.masked[rule] or value.split()[-1] in json.dumps(done.row['messages']): missed.append((rule, kind))
    for kind, make in IMPERSONAL.items(): false += [(kind, dict(masked)) for _ in range(n) if (masked := clean_row(row_with(dice, make(dice))).masked)]
    found = n * len(PERSONAL) - len(missed)
    assert found / (n * len(PERSONAL)) >= .98, sorted(set(missed))
    assert found / (found + len(false)) >= .98, false[:20]


HTML = ('<p>Dear team,</p><p>{}</p>', 'Hello,<br>{}<br/>Regards', '<div class="mail">{}</div>', '{} <a href="https://acme.example">here</a>', '<b>{}</b>', '{}&nbsp;thanks &amp; bye', '<ul><li>{}</li><li>more</li></ul>', '<html><body><p>{}</p></body></html>')
NO_HTML = ('List<String> {}', 'replace <name> by {}', 'if a < b and c > d then {}', 'How do I write {} in HTML? <p>x</p>', '```html\n<p>{}</p>\n```', 'use `<br>` for {}', '<note><to>{}</to></note>', 'vector<pair<int,int>> {}', 'AT&T and {}', 'x <- {} -> y',
           '{"text": "<b>{}</b>"}', 'from <b> to <i> by {}', '<form><p>{}</p></form>', 'echo "<br>{}";\n$x = 1;\n$y = 2;', '<think>{}</think> yes', 'Write {} with <b>bold</b> letters', '{} <3 you')


def test_markup_goes_where_it_is_left_over_only():
    said = ('my order is late', 'the total is wrong', 'I need an invoice')
    for text in said:
        for form in HTML:
            done = clean_row(make_row([{'role': 'user', 'content': form.replace('{}', text)}, {'role': 'assistant', 'content': 'We look into it.'}]))
            assert done.mended['clean.html'] and '<' not in done.row['messages'][0]['content'] and text in done.row['messages'][0]['content'], form
        for form in NO_HTML:
            given = form.replace('{}', text)
            assert clean_row(make_row([{'role': 'user', 'content': given}, {'role': 'assistant', 'content': 'Yes.'}])).row['messages'][0]['content'] == given, form


GERMAN, FRENCH = 'Größe und Gewicht der Äpfel sind für mich überhaupt nicht wichtig, aber schön müssen sie sein.', 'Où est passé l’été ? Ça fait des années que Noël n’a plus été aussi doux, et l’élève naïf s’en étonne.'


def test_mojibake_is_flagged_and_real_accents_are_not():
    for text in (GERMAN, FRENCH):
        row = lambda said: make_row([{'role': 'user', 'content': said}, {'role': 'assistant', 'content': 'Ja.'}])
        assert not clean_row(row(text)).flags['clean.mojibake']
        for encoding in ('cp1252', 'latin1'):
            garbled = text.encode().decode(encoding, 'replace')
            done = clean_row(row(garbled))
            assert done.flags['clean.mojibake'] and not done.problem
            assert clean_row(row(garbled), Clean(mojibake='drop')).problem[0] == 'clean.mojibake'


@pytest.mark.skipif(not DATA.is_dir(), reason='the public data sets are not here')
@pytest.mark.parametrize('name, language, rows', [('gsm8k_train', 'en', 2000), ('lf_alpaca_zh_demo', 'zh', 1000), ('gpteacher_roleplay', 'en', 1000), ('gpteacher_codegen', None, 1500)])
def test_real_text_is_left_alone(name, language, rows):
    with gzip.open(DATA / f'{name}.jsonl.gz', 'rt', encoding='utf8') as file: raw = [json.loads(line) for line, _ in zip(file, range(rows))]
    pairs = [(' '.join(filter(None, (one.get('instruction') or one.get('question'), one.get('input')))), one.get('response') or one.get('output') or one.get('answer')) for one in raw]
    done = [clean_row(make_row([{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': said or 'x'}])) for asked, said in pairs]
    share = lambda test: sum(map(test, done)) / len(done)
    assert share(lambda one: bool(one.problem)) <= .001
    assert share(lambda one: one.masked['pii.phone'] or one.masked['pii.card'] or one.masked['pii.national_id'] or one.masked['pii.iban']) <= .001
    assert share(lambda one: bool(one.flags['clean.mojibake'])) <= .002
    assert share(lambda one: bool(one.mended['clean.html'])) <= .002
    if language: assert share(lambda one: one.row['language'] not in (language, 'unknown')) <= .003
