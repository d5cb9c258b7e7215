"""A plug-in for slimbench: a method and a benchmark outside its repository."""
