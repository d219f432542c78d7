"""Stage 2: which prefixes of a prompt's rollouts are continued, and how often. One rule a class;
`registry` names them."""
