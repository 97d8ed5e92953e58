mod folders;
mod headers;
mod hub;
