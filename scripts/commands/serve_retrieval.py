"""`trace-async serve-retrieval`: a search server on this machine, for `retrieval_url`."""

import argparse

from trace_async.config import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", help="JSON object title → text or sentences, or rows with title and text")
    parser.add_argument("--retrieval", choices=("bm25", "dense", "hybrid"), default="bm25")
    parser.add_argument("--embedding-model", default="minilm", help="minilm, or a sentence-transformers directory")
    parser.add_argument("--query-prefix", default="", help='what the model wants before a query (E5: "query: ")')
    parser.add_argument("--passage-prefix", default="", help='what it wants before a passage (E5: "passage: ")')
    parser.add_argument("--port", type=int, default=8000)


def run(args: argparse.Namespace) -> int:
    from aiohttp import web

    from envs.multihop.qa_files import make_retriever, read_corpus
    from envs.multihop.search_server import make_app

    try:
        passages = read_corpus(args.corpus)
        retriever = make_retriever(
            passages,
            args.retrieval,
            embedding_model=args.embedding_model,
            query_prefix=args.query_prefix,
            passage_prefix=args.passage_prefix,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(
        f"{len(passages)} passages, {args.retrieval}: retrieval_url=http://127.0.0.1:{args.port}/retrieve", flush=True
    )
    # Loopback only: there is no password.
    web.run_app(make_app(retriever), host="127.0.0.1", port=args.port, print=None)
    return 0
