"""The columns that a statement reads and writes, from PostgreSQL's own parse tree of it.

PostgreSQL prints trees (`debug_print_parse`) and stores them (`pg_proc.prosqlbody`, `pg_policy.polqual`,
`pg_rewrite.ev_action`) in one format, with all names resolved. A column counts as read if it reaches a condition or the
result. Unused outputs of a subquery or CTE do not count, and neither does `x = x + 1`.
"""

import re
from collections.abc import Iterator
from typing import Any

Node = dict[str, Any]
Tables = dict[int, tuple[str, dict[int, str]]]
"""Names of tables, and of their columns by number, by oid."""

TOKEN = re.compile(r"""[(){}]|"(?:\\.|[^"\\])*"|(?:\\.|[^\s(){}\\])+""")
WHOLE_ROW = 0
RELATION, SUBQUERY, JOIN, CTE, GROUP = "0", "1", "2", "6", "9"
"""Kinds of range table entries (RTEKind in parsenodes.h)."""
INSERT, UPDATE = "3", "2"
"""Values of `commandType` (CmdType in nodes.h)."""
FIRST_OWN_OID = 16384
"""Functions with a smaller oid belong to PostgreSQL."""
EXISTS = "0"
"""The value of `subLinkType` of EXISTS, which reads no output of its subquery."""
OWN_WALK = {"targetList", "returningList", "rtable", "cteList", "rteperminfos", "onConflict", "utilityStmt"}
"""Fields of a query that have their own traversal, or that contain no used column."""


def parse(text: str) -> Any:  # noqa: ANN401 - as nested as the text
    """Return a node tree as dictionaries, with `type` and the node's fields, and lists."""
    stack: list[list[Any]] = [[]]
    for part in TOKEN.findall(text):
        if part in "({":
            stack.append([])
        elif part == ")":
            done = stack.pop()
            stack[-1].append(done)
        elif part == "}":
            done = stack.pop()
            node: Node = {"type": done[0]}
            field = ""
            for value in done[1:]:
                if isinstance(value, str) and value.startswith(":"):
                    field = value[1:]
                    node[field] = None
                elif node[field] is None:
                    node[field] = value
                elif value != "<>":
                    node.setdefault(f"{field}, more", []).append(value)
            stack[-1].append(node)
        else:
            stack[-1].append(None if part == "<>" else part)
    (tree,) = stack[0]
    return tree


class Use:
    """The columns that are read and written, as `table.column`."""

    def __init__(self, tables: Tables, row_types: dict[int, int]) -> None:
        """`row_types` has the table of each row type."""
        self.read: set[str] = set()
        self.written: set[str] = set()
        self._tables = tables
        self._row_types = row_types
        self._begun: set[int] = set()
        self._done: set[tuple[int, int, bool]] = set()
        self._own: tuple[int, int, int] | None = None

    def query(self, query: Node) -> None:
        """Count the columns of a whole statement."""
        if "outer" not in query:
            _link(query, None)
        self._begin(query)
        for number in self._outputs(query):
            self._demand(query, number)

    def condition(self, node: Any, table: int) -> None:  # noqa: ANN401
        """Count the columns in the condition of a policy."""
        entry = {"type": "RANGETBLENTRY", "rtekind": RELATION, "relid": str(table)}
        query: Node = {"rtable": [entry], "outer": None}
        _link(node, query)
        self._walk(node, query)

    def _begin(self, query: Node) -> None:
        """Count the columns that a query uses whichever outputs are used."""
        if id(query) in self._begun:
            return
        self._begun.add(id(query))
        for cte in query["cteList"] or ():
            if cte["ctequery"]["commandType"] != "1":
                self._begin(cte["ctequery"])
        changes = query["commandType"] in {INSERT, UPDATE}
        if changes:
            self._assign(query, query["targetList"])
        asked = _sorted_by(query) if not changes else set()
        for target in query["targetList"] or ():
            if not changes and (target["ressortgroupref"] in asked or target["resjunk"] == "true"):
                self._demand(query, int(target["resno"]))
        if conflict := query.get("onConflict"):
            self._assign(query, conflict["onConflictSet"])
            self._walk([conflict["onConflictWhere"]], query)
        self._enter(query)
        if (tree := query.get("setOperations")) and tree.get("all") != "true":
            for number in self._outputs(query):
                self._demand(query, number)
        self._walk([value for field, value in query.items() if field not in OWN_WALK and field != "outer"], query)

    def _enter(self, query: Node) -> None:
        """Count the columns that subqueries and functions in FROM use in any case."""
        for entry in query["rtable"] or ():
            if entry["rtekind"] == SUBQUERY:
                self._begin(entry["subquery"])
            elif entry["rtekind"] not in {RELATION, JOIN, CTE}:
                self._walk(list(entry.values()), query)

    def _assign(self, query: Node, targets: list[Node] | None) -> None:
        """Count the columns that an INSERT or UPDATE sets, and those in the values."""
        result = int(query["resultRelation"])
        table, columns = self._tables[int(query["rtable"][result - 1]["relid"])]
        for target in targets or ():
            number = int(target["resno"])
            if target["resjunk"] != "true":
                self.written.add(f"{table}.{columns[number]}")
            self._own = (id(query), result, number)
            self._walk(target["expr"], query)
            self._own = None

    def _outputs(self, query: Node) -> list[int]:
        field = "targetList" if query["commandType"] == "1" else "returningList"
        return [int(target["resno"]) for target in query[field] or () if target["resjunk"] != "true"]

    def _demand(self, query: Node, number: int, *, passed: bool = False) -> None:
        """Count the columns of an output of a query. `passed` tells that a row is passed to a function as a whole."""
        if (id(query), number, passed) in self._done:
            return
        self._done.add((id(query), number, passed))
        if tree := query.get("setOperations"):
            for arm in _arms(tree):
                self._demand(query["rtable"][arm - 1]["subquery"], number, passed=passed)
        if target := _target(query, number):
            own, self._own = self._own, None
            self._walk(target["expr"], query, passed=passed)
            self._own = own

    def _walk(self, node: Any, query: Node, *, passed: bool = False) -> None:  # noqa: ANN401
        """Count the columns that an expression reads. Rows that are passed to functions as a whole are
        counted there.
        """
        if isinstance(node, list):
            for one in node:
                self._walk(one, query)
        elif not isinstance(node, dict):
            return
        elif node["type"] == "VAR":
            self._variable(node, query, passed=passed)
        elif node["type"] == "SUBLINK":
            self._walk(node["testexpr"], query)
            self._begin(node["subselect"])
            if node["subLinkType"] != EXISTS:
                self.query(node["subselect"])
        elif node["type"] == "FIELDSELECT":
            self._field(node, query)
        elif node["type"] == "NULLTEST" or (node["type"] == "FUNCEXPR" and int(node["funcid"]) >= FIRST_OWN_OID):
            self._call(node, query)
        else:
            for value in node.values():
                self._walk(value, query)

    def _call(self, node: Node, query: Node) -> None:
        """Count the arguments of a function of the schema, except rows that it gets as a whole."""
        for one in [node["arg"]] if node["type"] == "NULLTEST" else node["args"] or ():
            if one["type"] == "ROWEXPR":
                self._passed_row(one, query)
            else:
                self._walk(one, query, passed=True)

    def _place(self, variable: Node, query: Node) -> tuple[Node, Node, int]:
        """Return the query that a variable belongs to, its range table entry, and the number of the column."""
        for _ in range(int(variable["varlevelsup"])):
            query = query["outer"]
        return query, query["rtable"][int(variable["varno"]) - 1], int(variable["varattno"])

    def _variable(self, variable: Node, query: Node, *, passed: bool) -> None:
        query, entry, number = self._place(variable, query)
        if entry["rtekind"] == RELATION:
            if self._own == (id(query), int(variable["varno"]), number) or (number == WHOLE_ROW and passed):
                return
            table, columns = self._tables.get(int(entry["relid"]), ("", {}))
            names = columns.values() if number == WHOLE_ROW else [columns[number]] if number in columns else []
            self.read |= {f"{table}.{name}" for name in names}
        elif entry["rtekind"] == JOIN:
            self._walk(entry["joinaliasvars"] if number == WHOLE_ROW else entry["joinaliasvars"][number - 1], query)
        elif entry["rtekind"] == GROUP:
            self._walk(entry["groupexprs"][number - 1], query, passed=passed)
        elif source := _source(entry, query):
            self._begin(source)
            for one in self._outputs(source) if number == WHOLE_ROW else [number]:
                self._demand(source, one, passed=passed)

    def _field(self, node: Node, query: Node) -> None:
        """Count one field of a row, which is a parameter or comes from a subquery."""
        if origin := self._origin(node, query):
            table, number = origin
            if number in self._tables[table][1]:
                name, columns = self._tables[table]
                self.read.add(f"{name}.{columns[number]}")
        else:
            self._walk(node["arg"], query)

    def _passed_row(self, node: Node, query: Node) -> None:
        """Count the columns of a row that is built for a function, except that row's own columns."""
        table = self._row_types.get(int(node["row_typeid"]))
        for number, field in enumerate(node["args"] or (), 1):
            if table is None or self._origin(field, query) != (table, number):
                self._walk(field, query)

    def _origin(self, node: Node, query: Node) -> tuple[int, int] | None:
        """Return the table and the number of the column of which an expression is a copy."""
        if node["type"] == "VAR":
            query, entry, number = self._place(node, query)
            if entry["rtekind"] == RELATION and int(entry["relid"]) in self._tables:
                return int(entry["relid"]), number
            source = _source(entry, query)
            target = source and _target(source, number)
            return self._origin(target["expr"], source) if source and target else None
        if node["type"] != "FIELDSELECT":
            return None
        row, number = node["arg"], int(node["fieldnum"])
        if row["type"] == "PARAM":
            table = self._row_types.get(int(row["paramtype"]))
            return None if table is None else (table, number)
        whole = self._origin(row, query)
        return (whole[0], number) if whole and whole[1] == WHOLE_ROW else None


def _link(node: Any, outer: Node | None) -> None:  # noqa: ANN401
    """Set the outer query of each query in a tree."""
    if isinstance(node, list):
        for one in node:
            _link(one, outer)
    elif isinstance(node, dict):
        inner = node if node.get("type") == "QUERY" else outer
        for value in node.values():
            _link(value, inner)
        if inner is node:
            node["outer"] = outer


def _sorted_by(query: Node) -> set[str]:
    """Return the marks of outputs that a query sorts or groups by."""
    clauses = [query.get(name) or () for name in ("sortClause", "groupClause", "distinctClause")]
    for window in query.get("windowClause") or ():
        clauses += [window["partitionClause"] or (), window["orderClause"] or ()]
    return {one["tleSortGroupRef"] for clause in clauses for one in clause}


def _arms(tree: Node) -> Iterator[int]:
    """Yield the range table entries of a UNION."""
    if tree["type"] == "RANGETBLREF":
        yield int(tree["rtindex"])
    else:
        yield from _arms(tree["larg"])
        yield from _arms(tree["rarg"])


def _target(query: Node, number: int) -> Node | None:
    field = "targetList" if query["commandType"] == "1" else "returningList"
    return next((one for one in query[field] or () if int(one["resno"]) == number), None)


def _owner(entry: Node, query: Node) -> Node:
    """Return the query that contains a subquery or CTE."""
    for _ in range(int(entry["ctelevelsup"]) if entry["rtekind"] == CTE else 0):
        query = query["outer"]
    return query


def _source(entry: Node, query: Node) -> Node | None:
    """Return the query of a range table entry."""
    if entry["rtekind"] == SUBQUERY:
        found: Node = entry["subquery"]
        return found
    if entry["rtekind"] != CTE:
        return None
    ctes = _owner(entry, query)["cteList"] or ()
    return next((one["ctequery"] for one in ctes if one["ctename"] == entry["ctename"]), None)
