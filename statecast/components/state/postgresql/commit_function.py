"""The function that applies commits inside the server, and what it is called with."""

from statecast.components.state.postgresql.schema import Layout, literal

COMMIT_REVISION = 3
"""The number of the commit function's body. A change that its callers need not know of counts it up, so that databases
get it; one that they must know of makes a new version of the function."""

MOST_LOCKS = 256
"""A call with more keys and marks than this has no other beside it, in no process."""

COMMIT_PARAMETERS = (
    *("n integer", "wait boolean"),
    *("g_commit integer[]", "g_type text[]", "g_id text[]", "g_token uuid[]"),
    *("o_commit integer[]", "o_kind text[]", "o_key text[]", "o_value bytea[]", "o_expected text[]"),
    *("o_ttl float8[]", "o_etag uuid[]"),
    *("m_commit integer[]", "m_digest bytea[]", "m_ttl float8[]", "m_etags text[]"),
    *("e_commit integer[]", "e_slice smallint[]", "e_order_key text[]", "e_event_id text[]", "e_format smallint[]"),
    *("e_pubsub text[]", "e_topic text[]", "e_metadata text[]", "e_body bytea[]"),
)
"""The parameters of the commit function: guards, operations, marks and events, each with the commit it is of."""

# These arrays come as they are: of bytes, of what is mostly null, and of marks, which are few.
_AS_ARRAY = frozenset({"o_value", "o_expected", "o_ttl", "e_body", "m_digest", "m_ttl", "m_etags"})


def _argument(number: int, name: str, type: str) -> str:
    """All other arrays come as their text, `{1,1,2}`: the driver takes many times longer over them."""
    return f"${number}::text::{type}" if type.endswith("[]") and name not in _AS_ARRAY else f"${number}"


COMMIT_ARGUMENTS = ", ".join(
    _argument(number, *parameter.split()) for number, parameter in enumerate(COMMIT_PARAMETERS, start=1)
)
"""What stands between the brackets of a call of the commit function, for the arguments that `CommitCall` makes."""

# The first halves of our advisory locks, far from the small numbers that other programs of the database may use.
_KEY_LOCKS = 0x5CA57001
_MARK_LOCKS = 0x5CA57002
_GATES = 0x5CA57003
# Longer than those inside wait for anything: a large commit must get in.
_PATIENCE_AT_GATE = "500ms"
_PATIENCE_ALONE = "100ms"
# Neighbours wait too, or all others where it is a large commit that waits.
_PATIENCE_TOGETHER = "50ms"


def commit_statement(layout: Layout, log: int, app_id: str) -> str:
    """Make the function that applies commits: version 1.

    It is given the parts of `n` commits as arrays, each part with the number of its commit (from 1), and answers
    one text for each commit: null for applied, else why nothing of it was: `fenced <i>`, `etag <i>`, `duplicate
    <i> <etags>` with the number of the guard, operation or mark among those of this call, or `busy`. Each commit's
    guards come sorted by type and id, its operations by the UTF-8 bytes of their key, its marks and events in their
    order; no guard, key or mark comes twice; arrays of what there is none of may be null. `o_kind` is
    u(psert), d(elete) or c(heck); `o_expected` an etag, `''` for absent, null for no condition. Times to live are
    seconds. `m_etags` is what the mark remembers of its commit's answer, `["<etag>", null]`; a duplicate tells it.

    The first rule broken is the one that is told: marks come before guards before operations, each in their order.

    With `wait` a commit waits for those that hold its claims, keys and marks; without, it is `busy` where it would
    have to, for then it has neighbours that should not wait with it. Nobody waits for long: errors with SQLSTATE 55P03
    ask for another try, as does SC001, a first write that another program's write came before. Nothing of the call is
    applied then.

    Locks are taken in one order everywhere: gate, marks, claims, keys, those of marks and keys in the order of their
    hashes, which several may share; then come the writes and last the events, whose ids are drawn under the locks of
    their keys and so are in the order of the commits.
    """
    parameters = ", ".join(COMMIT_PARAMETERS)
    return f"""
create or replace function {layout.commit(log)}(
  {parameters}
) returns text[] language plpgsql as $function$
-- revision {COMMIT_REVISION}
declare
  refusal text[] := array_fill(null::text, array[n]);
  guards constant integer := coalesce(cardinality(g_commit), 0);
  operations constant integer := coalesce(cardinality(o_commit), 0);
  marks constant integer := coalesce(cardinality(m_commit), 0);
  events constant integer := coalesce(cardinality(e_commit), 0);
  nothing text;
  found_etag text;
  found_expiry timestamptz;
  found_etags text;
  part record;
  hash integer;
  places tid[];
  inserted integer[];
  updated integer[];
  deleted integer[];
  broken integer[];
  broken_operation integer;
  broken_commit integer;
  written bigint;
  is_large constant boolean := operations + marks > {MOST_LOCKS};
  lock_timeout constant text := current_setting('lock_timeout');
begin
  -- As an attribute of the function the setting would end with it, before the commit.
  if current_setting('synchronous_commit') = 'off' then
    nothing := set_config('synchronous_commit', 'on', true);
  end if;

{_gate(layout)}

{_marks(layout)}

  for i in 1 .. guards loop
    continue when refusal[g_commit[i]] is not null;
    if wait then
      perform 1 from {layout.claims} c where c.app_id = {literal(app_id)}
        and c.type = g_type[i] and c.id = g_id[i] and c.token = g_token[i] for update;
    else
      perform 1 from {layout.claims} c where c.app_id = {literal(app_id)}
        and c.type = g_type[i] and c.id = g_id[i] and c.token = g_token[i] for update skip locked;
    end if;
    if not found then
      -- A token is given out once: if it stands there still, its row is held, else it will never be there again.
      perform 1 from {layout.claims} c where c.app_id = {literal(app_id)}
        and c.type = g_type[i] and c.id = g_id[i] and c.token = g_token[i];
      refusal[g_commit[i]] := case when found then 'busy' else 'fenced ' || i end;
    end if;
  end loop;

  if wait then
{_alone(layout, log)}
  else
{_together(layout, log)}
  end if;

  for i in 1 .. guards loop
    continue when refusal[g_commit[i]] is not null;
    update {layout.claims} c set commit_seq = commit_seq + 1
      where c.app_id = {literal(app_id)} and c.type = g_type[i] and c.id = g_id[i];
  end loop;
  nothing := set_config('lock_timeout', lock_timeout, true);
  return refusal;
end
$function$"""


def _gate(layout: Layout) -> str:
    """The part that lets small commits in beside each other and a large one alone, whose locks might not fit into the
    server's table: that has 64 for each connection.

    Those that come after a large one wait with it for those before it. So nobody inside waits for long: then all of the
    call is rolled back, its locks are free, and it comes again.
    """
    space = f"{_GATES}, hashtext({literal(layout.state)})"
    return f"""\
  -- (Assigning is much cheaper than PERFORM, which runs a query.)
  if operations + marks > 0 and not
    (case when is_large then pg_try_advisory_xact_lock({space}) else pg_try_advisory_xact_lock_shared({space}) end)
  then
    begin
      nothing := set_config('lock_timeout', '{_PATIENCE_AT_GATE}', true);
      if is_large then
        nothing := pg_advisory_xact_lock({space});
      else
        nothing := pg_advisory_xact_lock_shared({space});
      end if;
    exception when lock_not_available then
      return array_fill('busy'::text, array[n]);
    end;
  end if;
  nothing := set_config('lock_timeout',
    case when wait and not is_large then '{_PATIENCE_ALONE}' else '{_PATIENCE_TOGETHER}' end, true);"""


def _marks(layout: Layout) -> str:
    """The part that judges marks, before all else: a commit that is repeated must learn that it happened, although it
    is its own first application that has moved its etags, or its claim was taken over since."""
    return f"""\
  if marks > 0 and wait then
{_take_in_order(_MARK_LOCKS, "m_digest", "marks", "hashtext(encode({}, 'hex'))")}
    -- Backwards, here and below: the first one of a commit is the one that stays.
    for i in reverse marks .. 1 loop
      select expires_at, etags into found_expiry, found_etags from {layout.marks} where digest = m_digest[i];
      if found_expiry > clock_timestamp() then
        refusal[m_commit[i]] := concat_ws(' ', 'duplicate', i, found_etags);
      end if;
    end loop;
  elsif marks > 0 then
    for part in
      select m.commit from unnest(m_commit, m_digest) as m(commit, digest)
      where not is_large and not pg_try_advisory_xact_lock({_MARK_LOCKS}, hashtext(encode(m.digest, 'hex')))
    loop
      refusal[part.commit] := 'busy';
    end loop;
    for part in
      select m.commit, m.number, t.etags
      from unnest(m_commit, m_digest) with ordinality as m(commit, digest, number)
      cross join lateral (
        select etags from {layout.marks} where digest = m.digest and expires_at > clock_timestamp() offset 0) t
      order by m.number desc
    loop
      refusal[part.commit] := concat_ws(' ', 'duplicate', part.number, part.etags);
    end loop;
  end if;"""


def _take_in_order(space: int, members: str, count: str, hash_of: str) -> str:
    """Wait for the locks of `members` in the order of their hashes. A query takes long: one or two do without."""
    first, last = hash_of.format(f"{members}[1]"), hash_of.format(f"{members}[{count}]")
    return f"""\
    if {count} between 1 and 2 then
      nothing := pg_advisory_xact_lock({space}, least({first}, {last}));
      nothing := pg_advisory_xact_lock({space}, greatest({first}, {last}));
    elsif {count} > 2 and not is_large then
      foreach hash in array array(select {hash_of.format("member")} from unnest({members}) as member order by 1) loop
        nothing := pg_advisory_xact_lock({space}, hash);
      end loop;
    end if;"""


def _alone(layout: Layout, log: int) -> str:
    """The part of the commit function for one commit with few operations, in loops, which waits for every lock."""
    return f"""\
    -- A key that is absent has no row to lock, so every key has a lock of its own.
    if refusal[1] is null then
{_take_in_order(_KEY_LOCKS, "o_key", "operations", "hashtext({})")}
    end if;

    if array_remove(o_expected, null) <> '{{}}' then
      for i in 1 .. operations loop
        continue when refusal[o_commit[i]] is not null;
        select etag::text, expires_at into found_etag, found_expiry
          from {layout.state} where key = o_key[i] for update;
        -- Looked at now, not in the query, which evaluates its columns before it waits for the row.
        if found_expiry <= clock_timestamp() then
          found_etag := null;
        end if;
        if o_expected[i] = '' and found_etag is not null
          or o_expected[i] <> '' and found_etag is distinct from o_expected[i]
        then
          refusal[o_commit[i]] := 'etag ' || i;
        end if;
      end loop;
    end if;

    -- All is decided; what follows is written for the commits without a refusal.
    for i in 1 .. operations loop
      continue when refusal[o_commit[i]] is not null;
      if o_kind[i] = 'u' then
        insert into {layout.state} as t (key, value, etag, expires_at)
          values (o_key[i], o_value[i], o_etag[i], clock_timestamp() + make_interval(secs => o_ttl[i]))
        on conflict (key) do update set value = excluded.value, etag = excluded.etag,
          expires_at = excluded.expires_at, updated_at = clock_timestamp()
          where o_expected[i] is distinct from '' or t.expires_at <= clock_timestamp();
        if not found then
          raise exception using errcode = 'SC001',
            message = 'another program wrote a key that was to be written first';
        end if;
      elsif o_kind[i] = 'd' then
        delete from {layout.state} where key = o_key[i];
      end if;
    end loop;
    for i in 1 .. marks loop
      continue when refusal[m_commit[i]] is not null;
      insert into {layout.marks} (digest, expires_at, etags)
        values (m_digest[i], clock_timestamp() + make_interval(secs => m_ttl[i]), m_etags[i])
      on conflict (digest) do update set expires_at = excluded.expires_at, etags = excluded.etags;
    end loop;
    for i in 1 .. events loop
      continue when refusal[e_commit[i]] is not null;
      insert into {layout.outbox(log)} (slice, order_key, event_id, format, pubsub, topic, metadata, body)
        values (e_slice[i], e_order_key[i], e_event_id[i], e_format[i], e_pubsub[i], e_topic[i],
          e_metadata[i]::json, e_body[i]);
    end loop;"""


def _together(layout: Layout, log: int) -> str:
    """The part for many commits, in queries over all their operations, which never waits.

    Each key is looked up once; its row is found again by its place in the table, which stays the same under our lock. A
    row that is seen but was not taken is held by another transaction, or was until a moment ago. A key that had no row
    when it was looked up, and has one when it is written, was written by a program that does not know our locks: it is
    looked at anew by each commit alone.
    """
    return f"""\
    for part in
      select o.commit from unnest(o_commit, o_key) as o(commit, key)
      where not is_large and refusal[o.commit] is null
        and not pg_try_advisory_xact_lock({_KEY_LOCKS}, hashtext(o.key))
    loop
      refusal[part.commit] := 'busy';
    end loop;
    select array_agg(taken.place order by o.number),
      array_agg(o.number) filter (where o.kind = 'u' and taken.place is null),
      array_agg(o.number) filter (where o.kind = 'u' and taken.place is not null),
      array_agg(o.number) filter (where o.kind = 'd' and taken.place is not null),
      coalesce(array_agg(case when is_held then -o.number else o.number end order by o.number)
        filter (where is_held
          or o.expected = '' and taken.is_live
          or o.expected <> '' and (taken.is_live and taken.etag = o.expected) is not true), '{{}}')
      into places, inserted, updated, deleted, broken
      from unnest(o_commit, o_kind, o_key, o_expected) with ordinality as o(commit, kind, key, expected, number)
      left join lateral (
        select ctid as place from {layout.state} where key = o.key offset 0) seen on refusal[o.commit] is null
      left join lateral (
        select ctid as place, etag::text, (expires_at > clock_timestamp()) is not false as is_live
        from {layout.state} where ctid = seen.place and key = o.key for update skip locked) taken on true
      cross join lateral (select seen.place is not null and taken.place is null as is_held) held;
    foreach broken_operation in array broken loop
      broken_commit := o_commit[abs(broken_operation)];
      continue when refusal[broken_commit] is not null;
      refusal[broken_commit] := case when broken_operation < 0 then 'busy' else 'etag ' || broken_operation end;
    end loop;

    if updated is not null then
      update {layout.state} t set value = o_value[i], etag = o_etag[i],
        expires_at = clock_timestamp() + make_interval(secs => o_ttl[i]), updated_at = clock_timestamp()
        from unnest(updated) as i where t.ctid = places[i] and refusal[o_commit[i]] is null;
    end if;
    if inserted is not null then
      insert into {layout.state} (key, value, etag, expires_at)
        select o_key[i], o_value[i], o_etag[i], clock_timestamp() + make_interval(secs => o_ttl[i])
        from unnest(inserted) as i where refusal[o_commit[i]] is null
      on conflict (key) do nothing;
      get diagnostics written = row_count;
      if written < (select count(*) from unnest(inserted) as i where refusal[o_commit[i]] is null) then
        raise exception using errcode = 'SC001', message = 'another program wrote a key that was looked at as absent';
      end if;
    end if;
    if deleted is not null then
      delete from {layout.state} where ctid = any (array(
        select places[i] from unnest(deleted) as i where refusal[o_commit[i]] is null));
    end if;
    if marks > 0 then
      insert into {layout.marks} (digest, expires_at, etags)
        select m.digest, clock_timestamp() + make_interval(secs => m.ttl), m.etags
        from unnest(m_commit, m_digest, m_ttl, m_etags) as m(commit, digest, ttl, etags)
        where refusal[m.commit] is null
      on conflict (digest) do update set expires_at = excluded.expires_at, etags = excluded.etags;
    end if;
    if events > 0 then
      insert into {layout.outbox(log)} (slice, order_key, event_id, format, pubsub, topic, metadata, body)
        select e.slice, e.order_key, e.event_id, e.format, e.pubsub, e.topic, e.metadata::json, e.body
        from unnest(e_commit, e_slice, e_order_key, e_event_id, e_format, e_pubsub, e_topic, e_metadata, e_body)
          with ordinality as e(commit, slice, order_key, event_id, format, pubsub, topic, metadata, body, number)
        where refusal[e.commit] is null
        order by e.number;
    end if;"""
