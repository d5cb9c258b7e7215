"""What people look at. Everything here reads records only and never touches a model."""
