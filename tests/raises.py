"""pytest.raises for errors with codes, pytest.warns for warnings that name values."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rescom_timm.errors import CodedError, code_of


@contextmanager
def raises(
    code: str, *naming: object, kind: type[BaseException] = CodedError
) -> Iterator[pytest.ExceptionInfo[BaseException]]:
    """The block raises an error of `kind` with this code, whose message names each of `naming` (a key, a file, a value;
    not a sentence)."""
    with pytest.raises(kind) as caught:
        yield caught
    assert code_of(caught.value) == code, caught.value
    missing = [str(part) for part in naming if str(part) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@contextmanager
def warns(*naming: object, kind: type[Warning] = UserWarning) -> Iterator[pytest.WarningsRecorder]:
    """The block warns, and one warning of `kind` names each of `naming`."""
    with pytest.warns(kind) as caught:
        yield caught
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, kind)]
    assert any(all(str(part) in message for part in naming) for message in messages), messages


@contextmanager
def exits(code: int) -> Iterator[None]:
    """The block ends by SystemExit with this exit code, as argparse does."""
    with pytest.raises(SystemExit) as caught:
        yield
    assert caught.value.code == code
