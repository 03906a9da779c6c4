"""A file that is sent in several windows, for the tests of files on the wire; its fixtures are in `conftest.py`."""

from trioserve.static.sendfile import WINDOW

SIZE = 5 * WINDOW + 12_345
