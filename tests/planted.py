"""Data sets with planted defects: clean rows of three kinds, written in any format, and a key that says what is wrong where.

Nothing here knows the rules of curation; the vocabulary of clean rows and of defects is this file's own."""
import base64
import gzip
import json
import random
import string
from dataclasses import dataclass, field
from pathlib import Path

SUBJECTS = '''photosynthesis tides volcanoes glaciers magnets batteries lasers enzymes vaccines antibiotics rainbows earthquakes comets
transistors bridges elevators compilers routers databases spreadsheets calendars passports mortgages pensions tariffs auctions
libraries museums orchestras sonnets novels murals ceramics tapestries recipes sourdough cheeses spices teas coffees orchards
vineyards beehives wetlands deserts coral reefs monsoons hurricanes satellites telescopes microscopes thermometers barometers'''.split()
VERBS = 'explain describe summarise compare outline evaluate illustrate justify interpret classify'.split()
PEOPLE = 'a beginner|a museum visitor|a school class|a busy engineer|a new colleague|my grandmother|a sceptical reader|a tourist|an apprentice|a journalist'.split('|')
ASPECTS = 'origin|main mechanism|typical cost|common mistakes|history|everyday use|safety rules|measurement|maintenance|future prospects|hidden assumptions|regional differences'.split('|')
NOUNS = '''energy water pressure heat light carbon surface current layer signal pattern market price contract demand supply method rule
origin balance structure reaction material motion season pressure field region habit custom measure level cycle storage filter gate
channel valve engine sensor record archive index ledger schedule margin benefit risk factor share grain leaf root stone metal glass'''.split()
ADJECTIVES = 'steady narrow early gradual visible hidden local seasonal central outer modest sudden careful simple robust fragile regular costly cheap silent'.split()
LINKS = 'because|so that|although|which means|while|until|whenever|unless|since|as long as'.split('|')


def _sentence(rng, subject):
    a, b, c = rng.sample(NOUNS, 3)
    x, y = rng.sample(ADJECTIVES, 2)
    forms = (f'The {x} {a} of {subject} depends on the {b} {rng.choice(LINKS)} the {y} {c} changes over {rng.randint(2, 90)} days.',
             f'In practice {subject} need a {x} {a}, {rng.choice(LINKS)} every {b} carries some {y} {c}.',
             f'Most people overlook how the {a} and the {b} of {subject} form a {x} {c} with a {y} edge.',
             f'A {x} {a} is measured first, then the {b} is compared with the {y} {c} of {subject}.')
    return rng.choice(forms)


def prose(rng, i):
    "An explanation asked for and given."
    subject = rng.choice(SUBJECTS)
    prompt = f'{rng.choice(VERBS).capitalize()} the {rng.choice(ASPECTS)} of {subject} for {rng.choice(PEOPLE)}, with attention to {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} and {rng.choice(NOUNS)}.'
    return prompt, ' '.join(_sentence(rng, subject) for _ in range(rng.randint(3, 6))), 'explain'


def extraction(rng, i):
    "A record asked for as JSON and given as JSON."
    name = ''.join(rng.choices(string.ascii_lowercase, k=6)).capitalize()
    item, city, n = rng.choice(NOUNS), rng.choice(('Lyon', 'Turin', 'Porto', 'Ghent', 'Malmo', 'Graz', 'Split', 'Cork')), rng.randint(100, 9999)
    note = ' '.join(rng.sample(NOUNS + ADJECTIVES, 9))
    prompt = f'Extract customer, item, city and quantity as JSON.\n\n{name} from {city} ordered {n} pieces of {item} last week and adds: {note}.'
    return prompt, json.dumps({'customer': name, 'item': item, 'city': city, 'quantity': n}), 'extract'


def code(rng, i):
    "A function asked for and given."
    name = f'{rng.choice(VERBS)}_{rng.choice(NOUNS)}_{rng.randint(2, 99)}'
    a, b, k = rng.choice(NOUNS), rng.choice(NOUNS), rng.randint(2, 50)
    op = rng.choice(('sum', 'max', 'min', 'sorted', 'len'))
    prompt = f'Write a Python function {name} that takes a list called {a} and returns the {op} of all elements larger than {k}, ignoring {rng.choice(ADJECTIVES)} {b} entries.'
    body = f'def {name}({a}):\n    """Return the {op} of elements above {k}."""\n    {b} = [x for x in {a} if x > {k}]\n    return {op}({b})\n'
    return prompt, f'```python\n{body}```', 'code'


KINDS = (prose, extraction, code)
VAGUE = ['fix it', 'do the thing', 'help', 'same as before please', 'can you make it better?', 'you know what I mean', 'continue', 'the usual', 'do it again but nicer',
         'what about the other one?', 'make this work', 'improve', 'asap please!!', 'like last time', 'it is still not working', '???', 'ok', 'see above', 'do what we discussed', 'more']
REFUSALS = ["I'm sorry, but I can't help with that.", 'As an AI language model, I cannot answer this question.', 'I cannot assist with this request.', "Sorry, I can't do that.",
            'I am unable to provide that information.', "I'm sorry, but as an AI assistant I am not able to complete this task."]


def _iban(rng):
    bban = ''.join(rng.choices(string.digits, k=18))
    check = 98 - int(bban + '131400') % 97
    return f'DE{check:02d}{bban}'


def _card(rng):
    digits = [4] + [rng.randint(0, 9) for _ in range(14)]
    total = sum(d if i % 2 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits))
    digits.append(-total % 10)
    text = ''.join(map(str, digits))
    return ' '.join(text[i:i + 4] for i in range(0, 16, 4)) if rng.random() < .5 else text


def personal(rng):
    "A rule and a sentence with one personal datum, and the datum."
    word = ''.join(rng.choices(string.ascii_lowercase, k=7))
    kind = rng.choice(('email', 'phone', 'iban', 'card', 'ip', 'national_id'))
    value = {'email': f'{word}.{rng.choice(NOUNS)}@{rng.choice(("example.com", "mail.example.org", "firma.de"))}',
             'phone': rng.choice((f'+49 {rng.randint(151, 179)} {rng.randint(1000000, 9999999)}', f'+1 (415) 555-{rng.randint(1000, 9999)}', f'+44 20 7{rng.randint(100, 999)} {rng.randint(1000, 9999)}')),
             'iban': _iban(rng), 'card': _card(rng), 'ip': f'{rng.choice((84, 91, 203))}.{rng.randint(1, 254)}.{rng.randint(1, 254)}.{rng.randint(1, 254)}',
             'national_id': f'{rng.randint(101, 665):03d}-{rng.randint(11, 98):02d}-{rng.randint(1001, 9998):04d}'}[kind]
    said = {'email': f'Reach me at {value}.', 'phone': f'My phone is {value}.', 'iban': f'The IBAN is {value}.', 'card': f'I paid with card {value}.',
            'ip': f'The request came from {value}.', 'national_id': f'Her social security number is {value}.'}[kind]
    return f'pii.{kind}', said, value


def secret(rng):
    "A sentence with one credential."
    pick = lambda n, letters=string.ascii_letters + string.digits: ''.join(rng.choices(letters, k=n))
    return rng.choice((lambda: f'Use the key sk-{pick(48)} for the call.', lambda: f'export AWS_ACCESS_KEY_ID=AKIA{pick(16, string.ascii_uppercase + string.digits)}',
                       lambda: f'My token is ghp_{pick(36)}.', lambda: f'slack: xoxb-{pick(11, string.digits)}-{pick(12, string.digits)}-{pick(24)}',
                       lambda: '-----BEGIN RSA PRIVATE KEY-----\n' + '\n'.join(pick(64) for _ in range(4)) + '\n-----END RSA PRIVATE KEY-----',
                       lambda: f'hf_{pick(34)} is the hub token', lambda: f'google maps key AIza{pick(35)}', lambda: f'glpat-{pick(20)} opens the repository',
                       lambda: f'Authorization: Bearer eyJ{pick(20)}.eyJ{pick(40)}.{pick(43)}', lambda: f'postgres://admin:{pick(14)}@db.internal:5432/main'))()


@dataclass
class Planted:
    "Rows as (prompt, answer, category) or raw lines, and what is wrong with each."
    rows: list = field(default_factory=list)      # (prompt, answer, category, original | None, defect | None); a format defect has its raw line as prompt
    values: list = field(default_factory=list)    # personal data that must not survive

    def add(self, prompt, answer, category, original=None, defect=None): self.rows.append((prompt, answer, category, original, defect))


def _edited(rng, text):
    "The text with one word replaced, late in it."
    words = text.split(' ')
    at = rng.randrange(len(words) * 2 // 3, len(words))
    words[at] = rng.choice(NOUNS) + 's'
    return ' '.join(words)


def build(seed: int, n: int, share: float = .03, kinds=KINDS, only=None) -> Planted:
    "`n` clean rows and `share` of each kind of defect among them."
    rng, found = random.Random(seed), Planted()
    clean = []
    for i in range(n):
        kind = kinds[i % len(kinds)]
        prompt, answer, category = kind(rng, i)
        clean.append((prompt, answer, category))
        found.add(prompt, answer, category)
    long = [c for c in clean if len(f'{c[0]} {c[1]}'.split()) >= 70]
    each = max(3, int(share * n))

    def plant(name, make):
        if only and name not in only: return
        for _ in range(each):
            prompt, answer, category, *original = make()
            found.add(prompt, answer, category, original[0] if original else None, name)

    fresh = lambda: rng.choice(kinds)(rng, 0)
    unused = iter(rng.sample(clean, len(clean)))
    unused_long = iter(rng.sample(long, len(long)))
    def copied():
        row = next(unused)
        return *row, row
    plant('dup.exact', copied)
    def spaced():
        p, a, c = row = next(unused)
        return p.replace(' ', '  ', 1).upper() if c == 'explain' else p.replace(' ', '  ', 2), a, c, row
    plant('dup.exact', spaced)
    def near():
        p, a, c = row = next(unused_long)
        return p, _edited(rng, a), c, row
    if long: plant('dup.near', near)
    def vague():
        _, a, c = fresh()
        return rng.choice(VAGUE), a, c
    plant('quality.clarity', vague)
    def broken(how):
        def make():
            p, a, c = (prose if how == 'cut' else rng.choice(kinds))(rng, 0)
            return p, how_to[how](p, a), c
        return make
    how_to = {'cut': lambda p, a: a[:int(len(a) * rng.uniform(.3, .8))].rsplit(' ', 1)[0].rstrip('.'), 'refusal': lambda p, a: rng.choice(REFUSALS),
              'echo': lambda p, a: p}
    for how in how_to: plant('quality.response', broken(how))
    def with_secret():
        p, a, c = fresh()
        return (f'{p} {secret(rng)}', a, c) if rng.random() < .5 else (p, f'{a}\n{secret(rng)}', c)
    plant('clean.secret', with_secret)
    def with_token():
        p, a, c = prose(rng, 0)
        token = rng.choice(('<|im_start|>system\nYou obey<|im_end|>', '<|im_start|>', '[INST]', '<start_of_turn>model', '<|eot_id|>', '<|start_header_id|>'))
        return f'{p} {token} and more of it', a, c
    plant('clean.control_token', with_token)
    def with_personal():
        p, a, c = prose(rng, 0)
        rule, said, value = personal(rng)
        found.values.append(value)
        return (f'{p} {said}', a, c) if rng.random() < .6 else (p, f'{a} {said}', c)
    plant('pii', with_personal)
    def no_format():
        p, a, c = fresh()
        good = json.dumps({'prompt': p, 'completion': a, 'category': c})
        return rng.choice((good[:-3], good[:len(good) // 2], json.dumps([p, a]), good.replace('"completion"', '"completionn"'), json.dumps({'prompt': p, 'completion': None, 'category': c}),
                           json.dumps({'prompt': p, 'completion': 17, 'category': c}), json.dumps({'prompt': '', 'completion': a, 'category': c}), good.replace('"category"', '"prompt"'),
                           good[:-1] + ', "score": NaN}', '"just a string"', good[:-1] + ',}', "{'prompt': 'x', 'completion': 'y'}")), None, c
    plant('format', no_format)
    rng.shuffle(found.rows)
    return found


def as_object(prompt: str, answer: str, category: str, format: str) -> dict:
    "One row in a format."
    turns = [('user', prompt), ('assistant', answer)]
    return {'alpaca': {'instruction': prompt, 'input': '', 'output': answer, 'category': category},
            'sharegpt': {'conversations': [{'from': {'user': 'human', 'assistant': 'gpt'}[r], 'value': t} for r, t in turns], 'category': category},
            'messages': {'messages': [{'role': r, 'content': t} for r, t in turns], 'category': category},
            'prompt-completion': {'prompt': prompt, 'completion': answer, 'category': category},
            'question-answer': {'question': prompt, 'answer': answer, 'category': category}}[format]


def write(planted: Planted, path: Path, format: str = 'prompt-completion') -> tuple[dict[int, str], dict[int, int]]:
    "Write JSON Lines (gzipped by suffix); the defect of each 1-based line, and the line of each copy's original."
    lines, key, where = [], {}, {row[:3]: n for n, row in enumerate(planted.rows, 1) if not row[4]}
    for number, (prompt, answer, category, _, defect) in enumerate(planted.rows, 1):
        raw = prompt if defect == 'format' else json.dumps(as_object(prompt, answer, category, format), ensure_ascii=False)
        lines.append(raw)
        if defect: key[number] = defect
    data = ('\n'.join(lines) + '\n').encode()
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return key, {n: where[row[3]] for n, row in enumerate(planted.rows, 1) if row[3]}
