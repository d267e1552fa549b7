"""Complete small drivers on the public API, each the shape of a real family of drivers."""
