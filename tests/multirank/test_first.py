import pytest
from tests.support.tiny import mixed_rows, tiny_run
from tests.support.train import assert_same_training, train
B=[mixed_rows(s) for s in range(3)]
_ref={}
def ref():
    if 'a' not in _ref: _ref['a']=train(tiny_run(), B)
    return _ref['a']
@pytest.mark.parametrize("d", [dict(tensor=2), dict(pipeline=2), dict(context=2), dict(data=2), dict(tensor=2,expert=2), dict(data=2,expert=2), dict(vision_ranks=1)], ids=str)
def test_two(d):
    b = train(tiny_run(**d), B)
    assert_same_training(b,ref())
