"""What ``isthmus doctor`` looks at: one module a subject, one function a check, each told where to look."""
