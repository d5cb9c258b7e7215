"""The tests; a package of its own name, since a third party installs one called `tests`."""
