"""A plug-in of slimbench: a method and a benchmark outside its repository."""
