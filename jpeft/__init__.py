"""jpeft."""
from jpeft.version import __version__
