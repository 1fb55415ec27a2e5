import pytest

from transfer import errors


def tree(kind=errors.IsthmusError):
    """The classes that this module defines; the rooms' own subclasses may be loaded too."""
    yield kind
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def coded():
    """Those that travel as themselves; others travel as what they are a kind of."""
    return [kind for kind in tree() if "code" in vars(kind)]


def test_codes_are_unique():
    codes = [kind.code for kind in coded()]
    assert len(codes) == len(set(codes))


def test_the_docstring_draws_every_error():
    for kind in tree():
        assert kind.__name__ in errors.__doc__


@pytest.mark.parametrize("kind", [kind for kind in coded() if kind not in (errors.IsthmusError, errors.GeometryError)])
def test_an_error_survives_the_wire(kind):
    rebuilt = errors.from_wire(kind.code, "what went wrong")
    assert type(rebuilt) is kind
    assert str(rebuilt) == "what went wrong"


@pytest.mark.parametrize("code", ["geometry_mismatch", "internal_error", "from_the_future", ""])
def test_a_code_that_cannot_be_rebuilt_is_kept_in_the_message(code):
    rebuilt = errors.from_wire(code, "what went wrong")
    assert type(rebuilt) is errors.EngineError
    assert str(rebuilt) == f"{code}: what went wrong"


def test_a_model_that_cannot_be_split_travels_as_a_config_error():
    error = errors.UnsplittableError("no KV")
    assert error.reason == "no KV"
    assert str(error) == "no KV; [prefill] export = false serves it by routes gpu and cpu"
    assert type(errors.from_wire(error.code, str(error))) is errors.ConfigError


def test_a_request_error_names_its_field():
    assert errors.RequestError("too long", "prompt").param == "prompt"
    assert errors.RequestError("too long").param is None


def test_the_field_of_a_request_error_survives_the_wire():
    assert errors.from_wire("invalid_request", "too long", "prompt").param == "prompt"


def test_a_geometry_error_names_the_field_and_both_values():
    error = errors.GeometryError("num_layers", 30, 32)
    assert error.field == "num_layers"
    assert str(error) == "model geometry differs in num_layers: 30 here, 32 there"
